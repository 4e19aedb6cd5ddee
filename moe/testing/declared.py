"""Laws about what the class of a router declares: causality, what it reads, and rows of experts."""

import torch
from torch import Tensor

from moe.routers.base import Router
from moe.routers.seeding import seed_all
from moe.routing.decision import LABELS, Context, Knobs
from moe.testing.inputs import (
    D,
    E,
    S,
    context,
    hidden_states,
    labels,
    random_layer,
    random_router,
    run_as_second_layer,
    token_ids,
)
from moe.testing.law import Make, hold, law


@law
def expert_rows_are_declared(make: Make) -> None:
    """A router with a parameter of shape (num_experts, dim) says whether its rows produce the experts' logits.

    If it says nothing, the SimBal loss would be missing without a word. It can say no: by a property that is None.
    """
    width = 3 * D  # that no setting has by chance
    for router in make(width).chain:
        rows = [name for name, p in router.named_parameters() if p.shape == (E, width)]
        undeclared = type(router).expert_rows is Router.expert_rows
        advice = f"{rows[:1]}: return it from the property `expert_rows`, or return None there"
        hold(not (rows and undeclared), advice)


@law
def each_expert_row_belongs_to_one_expert(make: Make) -> None:
    """Each row of `expert_rows` is trainable and changes only the logits of its expert."""
    flat, ids = hidden_states().view(-1, D), token_ids()
    for router in random_router(make).eval().chain:
        rows = router.expert_rows
        if rows is None:
            continue
        hold(rows.shape == (E, D), f"expert_rows has the shape {tuple(rows.shape)}; return (num_experts, dim)")
        hold(any(rows is p for p in router.parameters()), "expert_rows must be a parameter of the router itself")
        before = router(flat, context(ids)).logits
        if before is None:  # ReLU, whose gates are its positive logits
            continue
        with torch.no_grad():
            rows[3] += 1.0
        changed = (router(flat, context(ids)).logits != before).any(0).tolist()
        advice = f"row 3 changes the logits of the experts {[e for e in range(E) if changed[e]]}"
        hold(changed == [expert == 3 for expert in range(E)], advice)


@law
def token_ids_are_declared(make: Make) -> None:
    """A router reads token ids if and only if it declares `uses_ids`."""
    x, ids = hidden_states(), token_ids()
    layer = random_layer(make).eval()
    output, with_other_ids = (run_as_second_layer(layer, x, context(each)).y for each in (ids, ids + 1))
    reads = not torch.equal(output, with_other_ids)
    hold(
        reads == layer.router.uses_ids,
        f"other token ids {'change' if reads else 'do not change'} the output: set `uses_ids = {reads}`",
    )


@law
def labels_are_declared(make: Make) -> None:
    """A router reads a label of `Context.told` if and only if it declares it in `told`."""
    x, given = hidden_states(), context(token_ids())
    layer = random_layer(make).eval()
    output, told = run_as_second_layer(layer, x, given).y, layer.router.told
    for column, name in enumerate(LABELS):
        other = labels(len(x))
        other[:, column] = 1 - other[:, column]
        changed = run_as_second_layer(layer, x, given._replace(told=other)).y
        reads = not torch.equal(output, changed)
        advice = f"another {name} {'changes' if reads else 'does not change'} the output"
        hold(reads == (name in told), f"{advice}: {'add it to' if reads else 'leave it out of'} `told`")


@law
def a_schedulable_router_uses_the_temperature(make: Make) -> None:
    """The temperature of a schedule changes the output in training if the router declares that it is `schedulable`."""
    if not random_router(make).schedulable:
        return
    x, ids = hidden_states(), token_ids()
    outputs = []
    for temperature in (1.0, 3.0):
        layer = random_layer(make)
        seed_all(0)
        outputs.append(run_as_second_layer(layer, x, Context(ids, Knobs.of(temperature=temperature))).y)
    advice = "context.knobs.temperature changes nothing: divide the logits by it, or set `schedulable = False`"
    hold(not torch.equal(*outputs), advice)


@law
def causality_is_declared(make: Make) -> None:
    """Outputs of a causal router do not depend on later tokens, in training (with equal noise) and in evaluation.

    The law replaces the last tokens of all sequences and compares the outputs of the tokens before them. Without a
    capacity limit it replaces all other sequences too. With one it does not, because sequences compete for capacity.
    A router without `fixed_k` is not tried under a capacity limit: the limit is a share of the number of assignments,
    and that number then depends on every token.
    """
    router = random_router(make)
    hold(router.is_causal(capacity=None, drop="score") == router.causal, "is_causal must agree with causal")
    limited = router.causal and router.fixed_k is not None
    hold(router.is_causal(capacity=1.0, drop="position") == limited, "is_causal must be false without fixed_k")
    hold(not router.is_causal(capacity=1.0, drop="score"), "drops by score are never causal")
    for capacity in (None, 0.6) if router.fixed_k is not None else (None,):
        training, evaluation = (_ignores_later_tokens(make, capacity, training=mode) for mode in (True, False))
        where = "without a capacity limit" if capacity is None else "under a capacity limit"
        advice = f"{where}, later tokens {'change nothing' if training and evaluation else 'change earlier outputs'}"
        hold((training and evaluation) == router.causal, f"{advice}: set `causal = {training and evaluation}`")
        advice = f"{where}, the property `causal_in_evaluation` must return {evaluation}"
        hold(evaluation == router.causal_in_evaluation, advice)


def _ignores_later_tokens(make: Make, capacity: float | None, *, training: bool) -> bool:
    x, ids = hidden_states(), token_ids()
    layer = random_layer(make).train(training)

    def output(tokens: Tensor, token_ids: Tensor) -> Tensor:
        seed_all(0)  # so that a router that draws random numbers draws the same ones for both inputs
        return run_as_second_layer(layer, tokens, context(token_ids, capacity=capacity)).y

    before = output(x, ids)[0, :5]
    for fill in (3.0, -3.0):
        changed_x, changed_ids = x.clone(), ids.clone()
        changed_x[:, 5:], changed_ids[:, 5:] = fill, 7
        if capacity is None:
            changed_x[1:], changed_ids[1:] = -2.0, 11
        if not torch.allclose(before, output(changed_x, changed_ids)[0, :5], atol=1e-6):
            return False
    return True


@law
def reading_other_tokens_is_declared(make: Make) -> None:
    """A token gets the same output alone and in a batch unless the router declares that it reads other tokens.

    Generation with a cache relies on this.
    """
    x, ids = hidden_states(), token_ids()
    layer = random_layer(make).eval()
    tokens = [(x[:1, t : t + 1], ids[:1, t : t + 1]) for t in range(S)]
    alone = torch.cat([run_as_second_layer(layer, one, context(its_id)).y for one, its_id in tokens], 1)
    in_batch = run_as_second_layer(layer, x, context(ids)).y[:1]
    equal, router = torch.allclose(alone, in_batch, rtol=1.3e-6, atol=1e-5), layer.router
    if equal:
        advice = (
            "a token gets the same output alone: set `reads_earlier_tokens = False` and, if causal, `causal = True`"
        )
        hold(router.decides_alone, advice)
    else:
        hold(not router.decides_alone, "earlier tokens change the output of a token: set `reads_earlier_tokens = True`")


@law
def the_order_of_sequences_does_not_matter(make: Make) -> None:
    """Permuting the sequences of a micro-batch permutes the output."""
    x, ids = hidden_states(), token_ids()
    layer = random_layer(make).eval()
    order = torch.tensor([2, 0, 1])
    shuffled = context(ids[order])._replace(told=labels(len(ids))[order])
    permuted = run_as_second_layer(layer, x[order], shuffled).y
    expected = run_as_second_layer(layer, x, context(ids)).y[order]
    hold(torch.allclose(permuted, expected, rtol=1.3e-6, atol=1e-5), "the number of a sequence changes its output")
