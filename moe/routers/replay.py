"""The routing of another model, on the same tokens."""

from jaxtyping import Float
from torch import Tensor

from moe.checks import require
from moe.routers.base import Router
from moe.routing.decision import Context, Routing
from moe.routing.loss_table import PROBABILITY_WEIGHTS


class Replay(Router):
    """Router that takes the experts and weights that another run's model gives to the same tokens in the same layer.

    That model is frozen. It runs on the text in evaluation mode, in fp32, without noise and without a capacity limit,
    beside the model that is trained, and no gradient reaches it. So the experts learn under a routing that does not
    learn together with them. Nothing here has weights. The router has no probabilities and no logits, so metrics and
    losses of those are null. FLOPs do not count the other model. Causal, because the other router must be. The model
    sets `mean_k` to the number of the other model's layer.

    run: the folder of the finished run. Its saved model must have the same tokenizer, the same MoE layers and the same
        number of experts.
    digest: the checksum of that model. It is filled in, and a given one must match.
    """

    uses_ids = True
    reads_earlier_tokens = True
    ignores = PROBABILITY_WEIGHTS | {"noise", "z"}
    why = "the frozen model of another run decides"

    def __init__(self, dim: int, num_experts: int, *, run: str, digest: str | None = None) -> None:
        super().__init__(dim, num_experts, fixed_k=None)
        self.replays = (run, digest)
        if digest is not None:
            self.same_as = {"run": None}  # the checksum says which model it is, whatever the name of the folder

    def forward(self, x: Float[Tensor, "T D"], context: Context) -> Routing:
        require(context.given is not None, "router", "replay", "used in our decoder alone")
        assert context.given is not None
        return Routing(*context.given[:3], probs=None, logits=None)
