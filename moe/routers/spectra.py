"""SPECTRA: a recurrence over depth, expression vectors, repulsion, a transport plan and quotas."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from moe.checks import finite, require
from moe.routers.base import Router, check_k
from moe.routers.quota import choose_within_quota
from moe.routers.sinkhorn import log_plan, plain_plan
from moe.routing.decision import Context, Routing
from moe.routing.stats import RoutingStats

DEFAULT_FACTOR = 1.25


class Spectra(Router):
    """Router that takes the top-k of a balanced transport plan over -cosine(routing vector, expression vector).

    Each token has one routing vector and one expression vector per expert. s is their cosine, and cost = -s plus the
    terms below. Every part can be switched off by itself:

    gru: the routing vectors are the state of a GRU that runs over layers, never over positions. It starts with h = 0
        before the first layer and has one set of weights for the whole model (as in 2408.06793). If false, they are a
        linear map of the hidden state, with its own weights in each layer.
    expression: the expression vectors are P x, with P initialized as an orthogonal matrix. If false, s is the cosine of
        the routing vector with (1, ..., 1), because a fixed direction is as good as a learned one, and the routing
        vector replaces the expression vector in all that follows.
    osr_repulsion_weight: weight of the term |s| R in the cost. R holds the squared cosines of the mean expression
        vectors of two experts.
    sinkhorn_epsilon: how soft the plan of exp(-cost / epsilon) is: a larger epsilon makes its rows more even.
    sinkhorn_iterations: how often rows and columns of the plan are scaled in turn. With 0 there is no plan.
    log_sinkhorn_enabled: compute the plan in logarithms. If false, directly: entries too small for fp32 become zero.
    sinkhorn_inference: use plan, quota and batch means in evaluation too. Text is then generated with use_cache=False.
    expert_choice_routing: give each expert a quota of tokens, those with the largest plan entries first. It can leave a
        token with fewer than k experts.
    expert_choice_capacity_factor: the quota of an expert is ceil(factor * T k / E) tokens.
    ema_bias_weight: weight of the term (load / mean load - 1) in the cost.
    ema_alpha: share of the earlier value in the moving averages over steps, of loads and of mean expression vectors.
    srip_enabled: add the auxiliary loss `srip`, which is 0 if the mean expression vectors are orthogonal.
    so_warmup_steps: the first optimizer steps, over which the weight of `srip` rises linearly from 0.
    so_lambda_max: the weight of `srip` after these steps.
    router_entropy_coef: weight of the loss `router_entropy`, the mean entropy of the rows of the plan.
    cosine_similarities_loss_coef: weight of the loss `cosine_similarity`, the mean of s^2.

    Gates are the rows of the plan over the chosen experts, summing to 1 (k=1: p itself), with a gradient through the
    plan. With a quota no load in training exceeds factor times the mean load. `lb` is 0 by default. Not causal in
    training, where plan, quota and means depend on the whole micro-batch. Evaluation uses no plan, no quota, and
    running means instead of means over the batch, so it is causal unless `sinkhorn_inference` is set. The router is
    declared causal only if neither repulsion nor plan nor quota is used.

    router_dim: dimensions of routing and expression vectors.
    """

    mean_expression: Tensor
    load: Tensor
    steps: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        k: int = 2,
        router_dim: int = 16,
        gru: bool = True,
        expression: bool = True,
        osr_repulsion_weight: float = 0.5,
        sinkhorn_epsilon: float = 0.1,
        sinkhorn_iterations: int = 3,
        log_sinkhorn_enabled: bool = True,
        sinkhorn_inference: bool = False,
        expert_choice_routing: bool = True,
        expert_choice_capacity_factor: float = DEFAULT_FACTOR,
        ema_bias_weight: float = 0.1,
        ema_alpha: float = 0.95,
        srip_enabled: bool = True,
        so_warmup_steps: int = 100,
        so_lambda_max: float = 0.05,
        router_entropy_coef: float = 1e-3,
        cosine_similarities_loss_coef: float = 8e-4,
    ) -> None:
        factors = expert_choice_capacity_factor, DEFAULT_FACTOR
        binding, binding_by_default = (factor * k < num_experts for factor in factors)
        limited = expert_choice_routing and binding
        super().__init__(dim, num_experts, fixed_k=None if limited else k)
        check_k(k, num_experts)
        self.mean_k = float(k)
        require(router_dim >= 1, "router.router_dim", router_dim, "at least 1")
        require(so_warmup_steps >= 1, "router.so_warmup_steps", so_warmup_steps, "at least 1")
        few = 0 <= sinkhorn_iterations <= 1000
        require(few, "router.sinkhorn_iterations", sinkhorn_iterations, "between 0 and 1000")
        epsilon, factor = sinkhorn_epsilon, expert_choice_capacity_factor
        for name, value in (("sinkhorn_epsilon", epsilon), ("expert_choice_capacity_factor", factor)):
            require(finite(value) and value > 0, f"router.{name}", value, "a finite number > 0")
        require(0 <= ema_alpha < 1, "router.ema_alpha", ema_alpha, "in [0, 1)")
        weights = {
            "osr_repulsion_weight": osr_repulsion_weight,
            "ema_bias_weight": ema_bias_weight,
            "so_lambda_max": so_lambda_max,
            "router_entropy_coef": router_entropy_coef,
            "cosine_similarities_loss_coef": cosine_similarities_loss_coef,
        }
        for name, value in weights.items():
            require(finite(value) and value >= 0, f"router.{name}", value, "a finite number >= 0")
        self.k, self.weights = k, weights
        self.epsilon, self.iterations = epsilon, sinkhorn_iterations
        self.plan = log_plan if log_sinkhorn_enabled else plain_plan
        self.inference = sinkhorn_inference
        self.quota_factor = factor if limited else None
        self.alpha = ema_alpha
        self.warmup = so_warmup_steps
        self.srip = srip_enabled and expression
        compared = osr_repulsion_weight or sinkhorn_iterations or self.quota_factor
        self.causal = not compared or (num_experts == 1 and not limited)
        useless = {
            "output_orthogonality": k == 1,
            "router.ema_bias_weight": k == num_experts,  # all loads are equal then
            "router.log_sinkhorn_enabled": not sinkhorn_iterations,
            "router.sinkhorn_inference": self.causal,
            "router.expert_choice_routing": not binding,
            # Without a quota, one of the two keys must say so where their defaults have a quota.
            "router.expert_choice_capacity_factor": not expert_choice_routing if binding else not binding_by_default,
            "router.srip_enabled": not expression,
            "router.so_lambda_max": not self.srip,
            "router.so_warmup_steps": not (self.srip and so_lambda_max),
        }
        if not limited:  # no factor matters, and neither does the key by which the quota was switched off
            self.same_as = {"expert_choice_routing": False, "expert_choice_capacity_factor": DEFAULT_FACTOR}
        with_one_expert = """noise router.osr_repulsion_weight router.sinkhorn_iterations router.log_sinkhorn_enabled
            router.so_lambda_max router.so_warmup_steps router.router_entropy_coef"""
        useless |= dict.fromkeys(with_one_expert.split(), True) if num_experts == 1 else {}
        self.ignores = frozenset(key for key, unused in useless.items() if unused)
        self.why = "each token has at most one expert" if k == 1 else ""

        width = num_experts * router_dim
        self.gru = nn.GRUCell(dim, width) if gru else None
        self.linear = None if gru else nn.Parameter(torch.empty(width, dim))
        self.projector = nn.Parameter(torch.empty(width, dim)) if expression else None
        self.register_buffer("mean_expression", torch.zeros(num_experts, router_dim))
        self.register_buffer("load", torch.full((num_experts,), 1 / num_experts))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def draw(self, name: str, tensor: Tensor, std: float) -> None:
        """Draw P as 0.1 * orthogonal, because the loss `srip` asks for orthogonal vectors.

        For each gate of the GRU the input weights are Xavier-uniform and the recurrent weights orthogonal.
        """
        if name == "projector":
            nn.init.orthogonal_(tensor, gain=0.1)
        elif name == "gru.weight_ih":
            for gate in tensor.chunk(3):
                nn.init.xavier_uniform_(gate)
        elif name == "gru.weight_hh":
            for gate in tensor.chunk(3):
                nn.init.orthogonal_(gate)
        elif name.startswith("gru."):
            nn.init.zeros_(tensor)
        else:
            super().draw(name, tensor, std)

    def tie_to(self, first: Router) -> None:
        assert isinstance(first, Spectra)
        self.gru = first.gru

    @property
    def causal_in_evaluation(self) -> bool:
        return self.causal or not self.inference

    @property
    def expert_directions(self) -> Float[Tensor, "E N"] | None:
        """The running means of the expression vectors, or None before the first step."""
        return self.mean_expression if self.steps else None

    @property
    def loss_weights(self) -> dict[str, float]:
        weights = {
            "router_entropy": self.weights["router_entropy_coef"],
            "cosine_similarity": self.weights["cosine_similarities_loss_coef"],
        }
        if self.srip:
            weights["srip"] = self.weights["so_lambda_max"] * min(1.0, self.steps.item() / self.warmup)
        return weights

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        state = self._next_state(x, context.state)
        heads = F.linear(x, self.linear.to(x.dtype)) if self.linear is not None else state
        assert heads is not None
        routing = F.normalize(heads.unflatten(-1, (self.num_experts, -1)), dim=-1)
        if self.projector is None:
            expression, similarity = routing, routing.sum(-1) / math.sqrt(routing.shape[-1])
        else:
            expression = F.normalize(F.linear(x, self.projector.to(x.dtype)).view_as(routing), dim=-1)
            similarity = (routing * expression).sum(-1)

        planned = self.training or self.inference
        mean = F.normalize(expression.mean(0), dim=-1)
        logits = -self._cost(similarity, mean if planned else F.normalize(self.mean_expression, dim=-1)) / self.epsilon
        scores = self.add_noise(logits, context.knobs).double()
        if planned:
            scores = self.plan(scores, self.iterations)
        scores = scores.log_softmax(-1)
        probs = scores.exp()
        quota = len(x)
        if planned and self.quota_factor is not None:
            quota = math.ceil(self.quota_factor * len(x) * self.k / self.num_experts)
        chosen = choose_within_quota(scores.detach(), self.k, quota)
        gated = chosen | ~chosen.any(-1, keepdim=True)  # a row without any expert would have no softmax
        weight = probs if self.k == 1 else torch.softmax(scores.masked_fill(~gated, -torch.inf), -1)

        aux = {"cosine_similarity": similarity.square().mean()}
        if self.srip:
            aux["srip"] = srip(mean)
        sums = expression.detach().sum(0).flatten()
        return Routing.masked(
            chosen, weight.to(x.dtype), probs=probs.to(x.dtype), logits=logits, aux=aux, feedback=sums, state=state
        )

    def _next_state(self, x: Float[Tensor, "T D"], state: Float[Tensor, "T H"] | None) -> Float[Tensor, "T H"] | None:
        if self.gru is None:
            return None
        if state is None:
            state = x.new_zeros(len(x), self.gru.hidden_size)
        gates, recurrent, *biases = (p.to(x.dtype) for p in self.gru.parameters())
        return torch.gru_cell(x, state, gates, recurrent, *biases)

    def _cost(self, similarity: Float[Tensor, "T E"], mean: Float[Tensor, "E N"]) -> Float[Tensor, "T E"]:
        """Return -s + repulsion * |s| R + bias, with R the squared cosines of different mean expression vectors."""
        cost = self.weights["ema_bias_weight"] * (self.load * self.num_experts - 1) - similarity
        if self.weights["osr_repulsion_weight"]:
            overlap = (mean @ mean.T).square().fill_diagonal_(0)
            cost = cost + self.weights["osr_repulsion_weight"] * similarity.abs() @ overlap
        return cost

    @torch.no_grad()
    def after_step(self, stats: RoutingStats) -> None:
        self.steps += 1
        self.load.lerp_((stats.offered / stats.assignments).to(self.load), 1 - self.alpha)
        latest = stats.feedback[: self.mean_expression.numel()].view_as(self.mean_expression) / stats.tokens
        self.mean_expression.lerp_(latest.to(self.mean_expression), 1 - self.alpha)


def srip(mean: Float[Tensor, "E N"]) -> Float[Tensor, ""]:
    """Return 0.7 ||G - I||_F^2 + 0.3 sigma_max(G - I)^2 for the Gram matrix G of unit vectors.

    It is 0 if the vectors are orthogonal. Bansal et al. (1810.09102) propose each of the two terms.
    """
    deviation = mean @ mean.T - torch.eye(len(mean), device=mean.device)
    return 0.7 * deviation.square().sum() + 0.3 * torch.linalg.matrix_norm(deviation, 2).square()
