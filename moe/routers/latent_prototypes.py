"""Latent prototypes: experts are prototypes in a small latent space, which losses keep apart and near to the tokens."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from moe.checks import finite, require
from moe.routers.base import Router, renormalized_top
from moe.routing.decision import Context, Routing


class LatentPrototypes(Router):
    """Router that takes the top-k of cos(z, p_i), z a latent code of x and p_i prototypes (LPR, Yang 2506.21328).

    The encoder gives the mean m = W_m silu(norm(x)) and the logarithm of the variance l = W_l silu(norm(x)) of a
    normal distribution in `latent` dimensions. z is drawn from it in training and is m in evaluation. Gates are the
    softmax of the cosines over the selected experts; with k=1, over all.

    Three auxiliary losses shape the latent space:
        latent_kl: mean over tokens of 1/2 sum (m^2 + exp(l) - 1 - l), which keeps codes near N(0, 1).
        latent_diversity: the Frobenius norm of P P^T - I for the normalized prototypes P, which keeps them apart.
        latent_alignment: mean squared distance of sum_i softmax(cos)_i p_i from z (a constant), for each entry. It
            moves prototypes to where tokens are.

    The method also moves prototypes by a moving average of their tokens, and adds a decoded code to the input of the
    experts. Neither is done here. Causal.

    k: experts per token.
    latent: dimensions of the latent space.
    kl: weight of the loss latent_kl.
    diversity: weight of the loss latent_diversity.
    alignment: weight of the loss latent_alignment.
    """

    expects_load = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        k: int = 2,
        latent: int = 16,
        kl: float = 1e-4,
        diversity: float = 0.01,
        alignment: float = 1e-3,
    ) -> None:
        super().__init__(dim, num_experts, fixed_k=k)
        require(latent >= 1, "router.latent", latent, "at least 1")
        for name, weight in (("kl", kl), ("diversity", diversity), ("alignment", alignment)):
            require(finite(weight) and weight >= 0, f"router.{name}", weight, "a finite number >= 0")
        self.k, self.kl, self.diversity, self.alignment = k, kl, diversity, alignment
        self.mean = nn.Parameter(torch.empty(latent, dim))
        self.log_variance = nn.Parameter(torch.empty(latent, dim))
        self.prototype = nn.Parameter(torch.empty(num_experts, latent))

    @property
    def loss_weights(self) -> dict[str, float]:
        return {"latent_kl": self.kl, "latent_diversity": self.diversity, "latent_alignment": self.alignment}

    @property
    def expert_rows(self) -> None:
        """None: prototypes do not have the width of x, unless `latent` happens to be that width."""
        return None

    @property
    def expert_directions(self) -> Float[Tensor, "E N"]:
        return self.prototype

    def draw(self, name: str, tensor: Tensor, std: float) -> None:
        """Draw prototypes from N(0, 1), because only their directions count, and the encoder like other matrices."""
        super().draw(name, tensor, 1.0 if name == "prototype" else std)

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        hidden = F.silu(F.layer_norm(x, x.shape[-1:]))
        mean, log_variance = (F.linear(hidden, matrix.to(x.dtype)) for matrix in (self.mean, self.log_variance))
        code = mean + (log_variance / 2).exp() * torch.randn_like(mean) if self.training else mean
        prototypes = F.normalize(self.prototype.to(x.dtype), dim=-1)
        logits = F.linear(F.normalize(code, dim=-1), prototypes)
        noisy = self.add_noise(logits, context.knobs)
        probs, expert, weight = renormalized_top(noisy, self.k)
        gram = prototypes @ prototypes.T
        aux = {
            "latent_kl": (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1).mean() / 2,
            "latent_diversity": (gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).norm(),
            "latent_alignment": F.mse_loss(torch.softmax(logits, -1) @ prototypes, code.detach()),
        }
        aux |= self.expected_load(logits, noisy, self.k, context)
        return Routing.token_choice(expert, weight, probs=probs, logits=logits, aux=aux)
