"""Hold a router to its contract, the docstring of `moe.routers.base.Router`: `check_router(MyRouter, k=2)`.

Each law is a function in `LAWS`. With pytest, one test for each law reads best:

    @pytest.mark.parametrize("law", moe.testing.LAWS)
    def test_my_router(law: str) -> None:
        moe.testing.check_law(law, MyRouter, k=2)
"""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe.checks import ConfigError, check_settings, first_line, require, unknown
from moe.config.classes import locate
from moe.config.keys import OFF
from moe.config.options import use
from moe.config.schema import Config
from moe.model.causal_lm import MoEOutput
from moe.model.experts import Experts
from moe.model.layer import LayerOutput, MoELayer
from moe.routers.base import Router
from moe.routing.decision import LABELS, Context, Knobs, Routing, TrainingText
from moe.routing.dispatch import dispatch
from moe.routing.loss_table import COSTLY
from moe.routing.losses import auxiliary
from moe.training.objective import total_loss

# Sequences, tokens of each, width, experts, and hidden width of an expert.
B, S, D, E, F = 3, 8, 16, 8, 12

# The training text of which routers learn: the frequencies of 1000 token ids, and two domains.
TEXT = TrainingText(torch.arange(1000), ("first", "second"))

Make = Callable[[int], Router]  # returns a new router for hidden states of the given width

LAWS: dict[str, Callable[[Make], None]] = {}


def check_router(target: type | str, /, **settings: Any) -> None:
    """Check all laws of the contract on a router.

    target: a class, or its dotted name. settings: its keyword arguments, as in its yaml file. Raises AssertionError,
    which names the law, what is wrong, and what to do, and ConfigError for settings that do not fit the class.
    """
    for law in LAWS:
        check_law(law, target, **settings)


def check_law(law: str, target: type | str, /, **settings: Any) -> None:
    """Check one law, a key of `LAWS`, like `check_router`. The random numbers of the caller stay as they are."""
    if not isinstance(law, str) or law not in LAWS:
        raise unknown("law", str(law), LAWS)
    if isinstance(target, str):
        use()  # the class may be in a folder that MOE_SEARCH_PATH names
    kind = target if isinstance(target, type) else locate(target, "router", trusted=True)
    require(issubclass(kind, Router), "target", kind.__name__, "a class that derives from moe.Router, or its name")
    settings = check_settings(settings, kind, "router", positional=2)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        try:
            LAWS[law](lambda dim: kind(dim, E, **settings))
        except ConfigError:
            raise
        except AssertionError as error:
            raise AssertionError(f"{kind.__name__} breaks the law {law}: {error}") from None
        except (Exception, SystemExit) as error:  # the router may raise anything
            what = f"it raises {type(error).__name__}: {first_line(error)}"
            raise AssertionError(f"{kind.__name__} breaks the law {law}: {what}") from error


def _law(check: Callable[[Make], None]) -> Callable[[Make], None]:
    LAWS[check.__name__] = check
    return check


def _hold(ok: object, advice: str) -> None:
    """Raise AssertionError with the advice unless `ok`."""
    if not ok:
        raise AssertionError(advice)


# ---- What the laws are tried on -----------------------------------------------------------------------------------


def random_router(make: Make, dim: int = D) -> Router:
    """Return a router whose parameters and buffers are all drawn at random, so that each of them has an effect."""
    torch.manual_seed(0)
    router = make(dim)
    for tensor in (*router.parameters(), *router.buffers()):
        if tensor.is_floating_point():
            nn.init.normal_(tensor, std=0.5)
    router.before_training(TEXT)
    return router


def random_layer(make: Make) -> MoELayer:
    """Return a Mixture-of-Experts layer with a random router and random experts."""
    router = random_router(make)
    experts = Experts(router.num_experts, D, hidden=F, kind="silu")
    for p in experts.parameters():
        nn.init.normal_(p, std=0.3)
    return MoELayer(router, experts)


def hidden_states() -> Tensor:
    """Return hidden states (B, S, D), the same at each call."""
    return torch.randn(B, S, D, generator=torch.Generator().manual_seed(1))


def token_ids() -> Tensor:
    """Return token ids (B, S), the same at each call."""
    return torch.randint(0, 1000, (B, S), generator=torch.Generator().manual_seed(2))


def context(ids: Tensor, *, noise: float = 0.0, capacity: float | None = None) -> Context:
    """Return what a router is told beside hidden states."""
    return Context(ids, Knobs.of(noise=noise), capacity, told=labels(len(ids)), given=decided(ids))


def decided(ids: Tensor) -> Routing:
    """Return `Context.given`: one or two experts for each token, which depend on its id and on earlier ones."""
    total = ids.cumsum(1).flatten()
    chosen = torch.zeros(len(total), E, dtype=torch.bool)
    chosen[torch.arange(len(total)).repeat(2), torch.cat([total % E, total // E % E])] = True
    token, expert = chosen.nonzero(as_tuple=True)
    return Routing(token, expert, 0.2 + 0.1 * expert, probs=None, logits=None)


def labels(sequences: int) -> Tensor:
    """Return `Context.told`: the sequences have the domains 0, 1, 0 ... of `TEXT`, and 1, 0, 1 ... when shuffled."""
    domain = torch.arange(sequences) % 2
    return torch.stack([domain, 1 - domain], 1)


def run_as_second_layer(layer: MoELayer, x: Tensor, context: Context) -> LayerOutput:
    """Run the layer twice. The second time, its router gets the state that it returned the first time."""
    return layer(x, context._replace(state=layer(x, context).routing[-1].state))


def rows_of(routing: Routing) -> int:
    """Return how many vectors the experts choose from: tokens, or slots if experts process slots."""
    return B * S if routing.slots is None else routing.slots.dispatch.shape[:2].numel()


def dense_weights(routing: Routing) -> Tensor:
    """Return the weight of each expert for each token (T, E), or for each slot (B * M, E) if experts process slots."""
    weights = torch.zeros(rows_of(routing), E)
    return weights.index_put((routing.token, routing.expert), routing.weight, accumulate=True)


# ---- The decision -------------------------------------------------------------------------------------------------


@_law
def assignments_are_valid(make: Make) -> None:
    """Tokens, experts and weights are in range, and no token asks for the same expert twice."""
    routing = random_router(make).eval().chain[0](hidden_states().view(-1, D), context(token_ids()))
    shapes = [tuple(part.shape) for part in (routing.token, routing.expert, routing.weight)]
    _hold(len(set(shapes)) == 1, f"token, expert and weight have the shapes {shapes}; give one entry per assignment")
    _hold(routing.weight.dtype == torch.float32, f"weights are {routing.weight.dtype}; return them in fp32")
    in_range = routing.token.min() >= 0 and routing.token.max() < rows_of(routing)
    _hold(in_range, "a token number is out of range; count the rows of x from 0")
    in_range = routing.expert.min() >= 0 and routing.expert.max() < E
    _hold(in_range, "an expert number is out of range; count the experts from 0 to num_experts - 1")
    _hold((routing.weight >= 0).all(), "a weight is negative; the output is a sum of experts with weights >= 0")
    _hold(routing.state is None or len(routing.state) == B * S, "state needs one row per token")
    pairs = torch.stack([routing.token, routing.expert])
    _hold(pairs.unique(dim=1).shape == pairs.shape, "a token asks for the same expert twice; choose distinct experts")


@_law
def the_input_is_not_changed(make: Make) -> None:
    """`forward` leaves the hidden states as they are, because the experts get them too."""
    x = hidden_states().view(-1, D)
    for link in random_router(make).chain:
        link(x, context(token_ids()))
        _hold(torch.equal(x, hidden_states().view(-1, D)), "forward changes x in place; work on a new tensor")


@_law
def evaluation_is_deterministic(make: Make) -> None:
    """Evaluation gives the same output twice, ignores noise, and changes no state."""
    x, ids = hidden_states(), token_ids()
    layer = random_layer(make).eval()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    first, second = (run_as_second_layer(layer, x, context(ids, noise=noise)).y for noise in (0.0, 9.0))
    _hold(torch.equal(first, second), "evaluation draws random numbers; draw them only if `self.training`")
    same = all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    _hold(same, "evaluation changes a buffer; learn in training or in `after_step`")


@_law
def probabilities_are_a_distribution(make: Make) -> None:
    """`Routing.probs` is a distribution over all experts, in fp32 even under bf16 autocast; or None."""
    layer = random_layer(make)
    routings: list[Routing] = []
    with torch.autocast("cpu", torch.bfloat16):
        layer.router.chain[0].register_forward_hook(lambda module, inputs, output: routings.append(output))
        layer(hidden_states().bfloat16(), context(token_ids()))
    probs = routings[0].probs
    if probs is None:
        return
    _hold(probs.shape == (B * S, E), f"probs has the shape {tuple(probs.shape)}; return (T, E), or None without any")
    _hold(probs.dtype == torch.float32, f"probs are {probs.dtype}; compute them in the precision of x")
    sums = torch.allclose(probs.sum(-1), torch.ones(B * S), atol=1e-5)
    _hold((probs >= 0).all() and sums, "probs of a token must be >= 0 and sum to 1 over all experts")


@_law
def the_layer_returns_the_weighted_sum_of_experts(make: Make) -> None:
    """The output of a layer is the sum of every expert's output, run on every token, with the router's weights.

    What the router itself adds (`Routing.added`) is a part of it.
    """
    x, ids = hidden_states(), token_ids()
    layer = random_layer(make).eval()
    flat = x.view(-1, D)
    for router in layer.router.chain:
        routing = router(flat, context(ids))
        rows = flat
        if routing.slots is not None:
            rows = torch.einsum("bms,bsd->bmd", routing.slots.dispatch, x).reshape(-1, D)
        outputs = layer.experts(rows.repeat(E, 1), torch.full((E,), len(rows))).view(E, -1, D)
        out = torch.einsum("te,etd->td", dense_weights(routing), outputs)
        if routing.slots is not None:
            out = torch.einsum("bsm,bmd->bsd", routing.slots.combine, out.view(B, -1, D)).reshape(-1, D)
        flat = flat + out if routing.added is None else flat + out + routing.added
    equal = torch.allclose(layer(x, context(ids)).y.view(-1, D), flat - x.view(-1, D), rtol=1.3e-6, atol=1e-5)
    _hold(equal, "the same input gives other assignments the second time, or assignments that the layer cannot use")


@_law
def fixed_k_is_right(make: Make) -> None:
    """With `fixed_k`, every token gets that many experts for every input, in training and evaluation."""
    router = random_router(make)
    for link in router.chain:
        _hold(link.fixed_k == router.fixed_k, "all routers of a chain need the same fixed_k")
        counts = _numbers_of_experts(link)
        if router.fixed_k is not None:
            advice = (
                f"tokens get {sorted(counts)} experts, and fixed_k={router.fixed_k}; pass fixed_k=None if it varies"
            )
            _hold(counts == {router.fixed_k}, advice)


@_law
def without_fixed_k_the_number_of_experts_varies(make: Make) -> None:
    """A router with `fixed_k=None` gives tokens different numbers of experts for some inputs."""
    router = random_router(make)
    for link in router.chain:
        slots = link(hidden_states().view(-1, D), context(token_ids())).slots is not None
        if router.fixed_k is None and not slots:
            counts = _numbers_of_experts(link)
            _hold(len(counts) > 1, f"every token gets {counts} experts; pass that number as fixed_k")


def _numbers_of_experts(router: Router) -> set[int]:
    """Return the numbers of experts that a token gets, for ordinary and extreme inputs."""
    flat, ids = hidden_states().view(-1, D), token_ids()
    inputs = [flat, 100 * flat, torch.full_like(flat, 0.7), torch.zeros_like(flat), torch.full_like(flat, 1e4)]
    counts: set[int] = set()
    for training, tokens, noise in itertools.product((True, False), inputs, (0.0, 1.0)):
        router.train(training)
        routing = router(tokens, context(ids, noise=noise))
        counts |= set(torch.bincount(routing.token, minlength=rows_of(routing)).tolist())
        single_token = router(tokens[:1], context(ids[:1, :1], noise=noise))
        if routing.slots is None:
            counts |= set(torch.bincount(single_token.token, minlength=1).tolist())
    return counts


# ---- Learning -----------------------------------------------------------------------------------------------------


@_law
def every_parameter_learns_from_the_output(make: Make) -> None:
    """Every parameter of a router gets a gradient from the layer's output, without auxiliary losses.

    With k=1 and renormalized weights that gradient would be exactly zero.
    """
    layer = random_layer(make)
    run_as_second_layer(layer, hidden_states(), context(token_ids())).y.square().sum().backward()
    for name, p in layer.router.named_parameters():
        advice = f"{name} gets no gradient; let the weights of the experts depend on it (with k=1, do not renormalize)"
        _hold(p.grad is not None and p.grad.norm() > 1e-4, advice)


@_law
def every_auxiliary_loss_has_a_gradient(make: Make) -> None:
    """Every auxiliary loss has a gradient on at least one parameter of the router.

    A balance loss would have no gradient if it used only integer counts, and almost none with a softmax of a softmax.
    One parameter is enough, because not every loss depends on all of them. The z-loss, for example, does not depend on
    learned noise.
    """
    router = random_router(make)
    parameters = list(router.chain[0].parameters())
    if not list(router.parameters()):
        return
    routing = router.chain[0](hidden_states().view(-1, D), context(token_ids()))
    loads = dispatch(routing, E, capacity=None, seq_len=S).offered
    losses = auxiliary(routing, loads, seq_len=S)
    _hold(losses, "there is no auxiliary loss; return probs or logits, or a loss of the router's own in `aux`")
    if len(loads.unique()) == 1:  # a router that balances by construction: its balance loss is constant
        all_experts = ("load_balance_sequence", "load_balance_document") if router.fixed_k == router.num_experts else ()
        for name in ("load_balance", "load_balance_global", *all_experts):
            _hold(abs(losses.pop(name).item() - 1) < 1e-6, f"{name} of an even load must be 1")
    for name, loss in losses.items():
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        norms = [g.norm() for g in gradients if g is not None]
        _hold(norms and max(norms) > 1e-4, f"the loss {name} has no gradient on the router; do not detach its inputs")


@_law
def keys_that_change_nothing_are_declared(make: Make) -> None:
    """A key changes the gradient of a training step if and only if the router does not declare that it ignores the key.

    The exception are capacity limits of routers whose experts take equally many slots or tokens by construction: a
    limit below that number would drop some of them, but the keys are ignored.
    """
    values = {"noise": 2.0, "capacity": 0.6, "drop": "score"}
    router = random_router(make)
    ignored = router.ignored_keys()
    allowed = OFF.keys() | router.setting_keys()
    _hold(ignored <= allowed, f"`ignores` names {sorted(ignored - allowed)}; allowed: {', '.join(sorted(allowed))}")
    dropless, limited = training_gradients(make), training_gradients(make, capacity=0.6)
    for key in OFF:
        off, base = (limited, {"capacity": 0.6}) if key == "drop" else (dropless, {})
        on = training_gradients(make, **base, **{key: values.get(key, 1.0)})
        difference = (on - off).norm() / off.norm()
        if key not in ignored:
            _hold(difference > 1e-3, f"{key} changes nothing; the router should declare it in `ignores`")
        elif key != "capacity" and not (key == "drop" and "capacity" in ignored):
            _hold(difference < 1e-5, f"{key} changes something, although the router ignores it")


def training_gradients(make: Make, **settings: Any) -> Tensor:
    """Return the gradient of a training step on all weights of a layer, under these keys of the configuration.

    The step has two micro-batches with the same hidden states.
    """
    config = Config(**(OFF | settings))
    layer = random_layer(make)
    layer_context = context(token_ids(), noise=config.noise, capacity=config.capacity)
    torch.manual_seed(0)
    costly = frozenset(key for key in COSTLY if getattr(config, key))
    for _ in range(2):  # micro-batches: a router may draw at random what it does with one
        output = layer(hidden_states(), layer_context._replace(drop=config.drop, costly=costly))
        aux = {name: value[None] for name, value in output.aux.items()}
        loss = output.y.square().mean()
        total_loss(config, [layer.router.loss_weights], MoEOutput(loss=loss, aux=aux)).backward()
    return torch.cat([torch.zeros(1) if p.grad is None else p.grad.flatten() for p in layer.parameters()])


@_law
def a_loaded_state_goes_on_as_the_saved_one(make: Make) -> None:
    """A second router that loads the state of a trained one decides and learns the same.

    The second one is made from another seed, so that random numbers outside of parameters and buffers differ.
    """
    x, ids = hidden_states(), token_ids()
    layers: list[MoELayer] = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        router = make(D)
        router.initialize(0.5)
        layers.append(MoELayer(router, layers[0].experts if layers else Experts(E, D, hidden=F, kind="silu")))
    trained, resumed = layers
    nn.init.normal_(trained.experts.up)
    nn.init.normal_(trained.experts.down)
    trained.router.before_training(TEXT)

    def results(layer: MoELayer) -> list[Any]:
        """Return what the layer computes in training and in evaluation. Then let its router learn from a step."""
        torch.manual_seed(0)
        outputs = [run_as_second_layer(layer.train(mode), x, context(ids, noise=0.1)) for mode in (False, True)]
        weights = layer.router.loss_weights
        for link in layer.router.chain:
            link.after_step(outputs[1].stats)
        return [*(torch.stack([each.y.sum(), *each.aux.values()]).tolist() for each in outputs), weights]

    for _ in range(2):
        results(trained)
    resumed.router.load_state_dict(trained.router.state_dict())
    for _ in range(2):
        equal = results(resumed) == results(trained)
        _hold(equal, "a resumed router decides otherwise; keep all state in parameters and persistent buffers")


# ---- What the router declares -------------------------------------------------------------------------------------


@_law
def expert_rows_are_declared(make: Make) -> None:
    """A router with a parameter of shape (num_experts, dim) says whether its rows produce the experts' logits.

    If it says nothing, the SimBal loss would be missing without a word. It can say no: by a property that is None.
    """
    width = 3 * D  # that no setting has by chance
    for router in make(width).chain:
        rows = [name for name, p in router.named_parameters() if p.shape == (E, width)]
        undeclared = type(router).expert_rows is Router.expert_rows
        advice = f"{rows[:1]}: return it from the property `expert_rows`, or return None there"
        _hold(not (rows and undeclared), advice)


@_law
def each_expert_row_belongs_to_one_expert(make: Make) -> None:
    """Each row of `expert_rows` is trainable and changes only the logits of its expert."""
    flat, ids = hidden_states().view(-1, D), token_ids()
    for router in random_router(make).eval().chain:
        rows = router.expert_rows
        if rows is None:
            continue
        _hold(rows.shape == (E, D), f"expert_rows has the shape {tuple(rows.shape)}; return (num_experts, dim)")
        _hold(any(rows is p for p in router.parameters()), "expert_rows must be a parameter of the router itself")
        before = router(flat, context(ids)).logits
        if before is None:  # ReLU, whose gates are its positive logits
            continue
        with torch.no_grad():
            rows[3] += 1.0
        changed = (router(flat, context(ids)).logits != before).any(0).tolist()
        advice = f"row 3 changes the logits of the experts {[e for e in range(E) if changed[e]]}"
        _hold(changed == [expert == 3 for expert in range(E)], advice)


@_law
def token_ids_are_declared(make: Make) -> None:
    """A router reads token ids if and only if it declares `uses_ids`."""
    x, ids = hidden_states(), token_ids()
    layer = random_layer(make).eval()
    output, with_other_ids = (run_as_second_layer(layer, x, context(each)).y for each in (ids, ids + 1))
    reads = not torch.equal(output, with_other_ids)
    _hold(
        reads == layer.router.uses_ids,
        f"other token ids {'change' if reads else 'do not change'} the output: set `uses_ids = {reads}`",
    )


@_law
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
        _hold(reads == (name in told), f"{advice}: {'add it to' if reads else 'leave it out of'} `told`")


@_law
def a_schedulable_router_uses_the_temperature(make: Make) -> None:
    """The temperature of a schedule changes the output in training if the router declares that it is `schedulable`."""
    if not random_router(make).schedulable:
        return
    x, ids = hidden_states(), token_ids()
    outputs = []
    for temperature in (1.0, 3.0):
        layer = random_layer(make)
        torch.manual_seed(0)
        outputs.append(run_as_second_layer(layer, x, Context(ids, Knobs.of(temperature=temperature))).y)
    advice = "context.knobs.temperature changes nothing: divide the logits by it, or set `schedulable = False`"
    _hold(not torch.equal(*outputs), advice)


@_law
def causality_is_declared(make: Make) -> None:
    """Outputs of a causal router do not depend on later tokens, in training (with equal noise) and in evaluation.

    The law replaces the last tokens of all sequences and compares the outputs of the tokens before them. Without a
    capacity limit it replaces all other sequences too. With one it does not, because sequences compete for capacity.
    A router without `fixed_k` is not tried under a capacity limit: the limit is a share of the number of assignments,
    and that number then depends on every token.
    """
    router = random_router(make)
    _hold(router.is_causal(capacity=None, drop="score") == router.causal, "is_causal must agree with causal")
    limited = router.causal and router.fixed_k is not None
    _hold(router.is_causal(capacity=1.0, drop="position") == limited, "is_causal must be false without fixed_k")
    _hold(not router.is_causal(capacity=1.0, drop="score"), "drops by score are never causal")
    for capacity in (None, 0.6) if router.fixed_k is not None else (None,):
        training, evaluation = (_ignores_later_tokens(make, capacity, training=mode) for mode in (True, False))
        where = "without a capacity limit" if capacity is None else "under a capacity limit"
        advice = f"{where}, later tokens {'change nothing' if training and evaluation else 'change earlier outputs'}"
        _hold((training and evaluation) == router.causal, f"{advice}: set `causal = {training and evaluation}`")
        advice = f"{where}, the property `causal_in_evaluation` must return {evaluation}"
        _hold(evaluation == router.causal_in_evaluation, advice)


def _ignores_later_tokens(make: Make, capacity: float | None, *, training: bool) -> bool:
    x, ids = hidden_states(), token_ids()
    layer = random_layer(make).train(training)

    def output(tokens: Tensor, token_ids: Tensor) -> Tensor:
        torch.manual_seed(0)  # so that a router that draws random numbers draws the same ones for both inputs
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


@_law
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
        _hold(router.decides_alone, advice)
    else:
        _hold(
            not router.decides_alone, "earlier tokens change the output of a token: set `reads_earlier_tokens = True`"
        )


@_law
def the_order_of_sequences_does_not_matter(make: Make) -> None:
    """Permuting the sequences of a micro-batch permutes the output."""
    x, ids = hidden_states(), token_ids()
    layer = random_layer(make).eval()
    order = torch.tensor([2, 0, 1])
    shuffled = context(ids[order])._replace(told=labels(len(ids))[order])
    permuted = run_as_second_layer(layer, x[order], shuffled).y
    expected = run_as_second_layer(layer, x, context(ids)).y[order]
    _hold(torch.allclose(permuted, expected, rtol=1.3e-6, atol=1e-5), "the number of a sequence changes its output")


# ---- Unusual inputs, precision and devices ------------------------------------------------------------------------


@_law
def unusual_batches_are_finite(make: Make) -> None:
    """Outputs and gradients are finite with ties, with all tokens at one expert, and with experts that get no token.

    The gradient of an expert that gets no token is 0. Every assignment is counted.
    """
    fills = {"one token": 1.0, "identical tokens": 0.7, "zeros": 0.0, "huge": 1e4, "far below 0": 1e4}
    for (batch, fill), capacity in itertools.product(fills.items(), (None, 1.0)):
        shape = (1, 1, D) if batch == "one token" else (B, S, D)
        layer = random_layer(make)
        if batch == "far below 0":  # every logit of a linear router is then so negative that its sigmoid is 0 in fp32
            with torch.no_grad():
                for p in layer.router.parameters():
                    p.copy_(-p.abs())
        x = torch.full(shape, fill).requires_grad_()
        output: LayerOutput = layer(x, context(torch.full(shape[:2], 3), capacity=capacity))
        (output.y.mean() + sum(output.aux.values())).backward()
        _hold(output.y.isfinite().all(), f"{batch}: the output is not finite")
        for name, p in layer.named_parameters():
            _hold(p.grad is not None, f"{batch}: {name} gets no gradient; keep it in the graph, with weight 0 at least")
            _hold(p.grad.isfinite().all(), f"{batch}: the gradient of {name} is not finite")  # type: ignore[union-attr]
        counted = output.stats.offered.sum() == output.stats.assignments
        _hold(counted and output.stats.kept.sum() <= output.stats.assignments, f"{batch}: assignments are lost")
        gradient = layer.experts.up.grad
        assert gradient is not None
        _hold((gradient[output.stats.kept == 0] == 0).all(), f"{batch}: an expert without tokens gets a gradient")


@_law
def large_logits_choose_as_in_fp64(make: Make) -> None:
    """The router chooses in fp32 what it chooses in fp64, for hidden states and so for logits of any size.

    The logits themselves differ by more than their rounding. But probabilities of fp32 round to ties where logits
    differ by 104 (softmax) or are above 17 (sigmoid). Those of fp64 do so at 745 and 37.
    """
    router, ids = random_router(make).eval(), token_ids()
    exact = copy.deepcopy(router).double()
    for scale in (1.0, 4.0, 16.0, 64.0, 256.0):
        x = scale * torch.randn(B * S, D, generator=torch.Generator().manual_seed(3))
        for link, exact_link in zip(router.chain, exact.chain, strict=True):
            routing, reference = link(x, context(ids)), exact_link(x.double(), context(ids))
            for values in (reference.probs, reference.logits):
                _hold(values is None or values.dtype == torch.float64, "compute in the precision of x")
            chosen, expected = (
                sorted(zip(r.token.tolist(), r.expert.tolist(), strict=True)) for r in (routing, reference)
            )
            advice = f"at {scale} times the hidden states fp64 chooses other experts: choose by logits"
            _hold(chosen == expected, advice)


@_law
def tensors_are_created_on_the_device_of_the_input(make: Make) -> None:
    """The layer and its router create all tensors on the device of their input.

    On a GPU the default device (the CPU) is another one. Here the default device is `meta`, because mixing it with the
    CPU is an error.
    """
    x, ids = hidden_states().requires_grad_(), token_ids()
    layer = random_layer(make)
    for capacity in (None, 1.0):
        layer_context = context(ids, noise=0.1, capacity=capacity)._replace(
            costly=COSTLY, compared=torch.arange(0, ids.numel(), 3)
        )
        try:
            with torch.device("meta"):
                output = layer(x, layer_context)
                torch.stack([output.y.square().mean(), *output.aux.values()]).sum().backward()
                for router in layer.router.chain:
                    router.after_step(output.stats)
        except (RuntimeError, NotImplementedError) as error:
            advice = "give device=x.device to each new tensor"
            raise AssertionError(f"a tensor is created on the default device ({error}); {advice}") from error
