"""Laws about gradients, about the settings of a router, and about its state."""

from typing import Any

import torch
from torch import Tensor, nn

from moe.config.keys import OFF
from moe.config.schema import Config
from moe.model.causal_lm import MoEOutput
from moe.model.experts import Experts
from moe.model.layer import MoELayer
from moe.routers.seeding import seed_all
from moe.routing.dispatch import dispatch
from moe.routing.loss_table import COSTLY
from moe.routing.losses import auxiliary
from moe.testing.inputs import (
    TEXT,
    D,
    E,
    F,
    S,
    context,
    hidden_states,
    random_layer,
    random_router,
    run_as_second_layer,
    token_ids,
)
from moe.testing.law import Make, hold, law
from moe.training.objective import total_loss


@law
def every_parameter_learns_from_the_output(make: Make) -> None:
    """Every parameter of a router gets a gradient from the layer's output, without auxiliary losses.

    With k=1 and renormalized weights that gradient would be exactly zero.
    """
    layer = random_layer(make)
    run_as_second_layer(layer, hidden_states(), context(token_ids())).y.square().sum().backward()
    for name, p in layer.router.named_parameters():
        advice = f"{name} gets no gradient; let the weights of the experts depend on it (with k=1, do not renormalize)"
        hold(p.grad is not None and p.grad.norm() > 1e-4, advice)


@law
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
    hold(losses, "there is no auxiliary loss; return probs or logits, or a loss of the router's own in `aux`")
    if len(loads.unique()) == 1:  # a router that balances by construction: its balance loss is constant
        all_experts = ("load_balance_sequence", "load_balance_document") if router.fixed_k == router.num_experts else ()
        for name in ("load_balance", "load_balance_global", *all_experts):
            hold(abs(losses.pop(name).item() - 1) < 1e-6, f"{name} of an even load must be 1")
    for name, loss in losses.items():
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        norms = [g.norm() for g in gradients if g is not None]
        hold(norms and max(norms) > 1e-4, f"the loss {name} has no gradient on the router; do not detach its inputs")


@law
def keys_that_change_nothing_are_declared(make: Make) -> None:
    """A key changes the gradient of a training step if and only if the router does not declare that it ignores the key.

    The exception are capacity limits of routers whose experts take equally many slots or tokens by construction: a
    limit below that number would drop some of them, but the keys are ignored.
    """
    values = {"noise": 2.0, "capacity": 0.6, "drop": "score"}
    router = random_router(make)
    ignored = router.ignored_keys()
    allowed = OFF.keys() | router.setting_keys()
    hold(ignored <= allowed, f"`ignores` names {sorted(ignored - allowed)}; allowed: {', '.join(sorted(allowed))}")
    dropless = training_gradients(make)
    needs = {"drop": {"capacity": 0.6}, "load": {"noise": 2.0}}
    without = {key: training_gradients(make, **base) for key, base in needs.items()}
    for key in OFF:
        off, base = without.get(key, dropless), needs.get(key, {})
        on = training_gradients(make, **base, **{key: values.get(key, 1.0)})
        difference = (on - off).norm() / off.norm()
        if key not in ignored:
            hold(difference > 1e-3, f"{key} changes nothing; the router should declare it in `ignores`")
        elif key != "capacity" and not (key == "drop" and "capacity" in ignored):
            hold(difference < 1e-5, f"{key} changes something, although the router ignores it")


def training_gradients(make: Make, **settings: Any) -> Tensor:
    """Return the gradient of a training step on all weights of a layer, under these keys of the configuration.

    The step has two micro-batches with the same hidden states.
    """
    config = Config(**(OFF | settings))
    layer = random_layer(make)
    layer_context = context(token_ids(), noise=config.noise, capacity=config.capacity)
    seed_all(0)
    costly = frozenset(key for key in COSTLY if getattr(config, key))
    for _ in range(2):  # micro-batches: a router may draw at random what it does with one
        output = layer(hidden_states(), layer_context._replace(drop=config.drop, costly=costly))
        aux = {name: value[None] for name, value in output.aux.items()}
        loss = output.y.square().mean()
        total_loss(config, [layer.router.loss_weights], MoEOutput(loss=loss, aux=aux)).backward()
    return torch.cat([torch.zeros(1) if p.grad is None else p.grad.flatten() for p in layer.parameters()])


@law
def a_loaded_state_goes_on_as_the_saved_one(make: Make) -> None:
    """A second router that loads the state of a trained one decides and learns the same.

    The second one is made from another seed, so that random numbers outside of parameters and buffers differ.
    """
    x, ids = hidden_states(), token_ids()
    layers: list[MoELayer] = []
    for seed in (1, 2):
        seed_all(seed)
        router = make(D)
        router.initialize(0.5)
        layers.append(MoELayer(router, layers[0].experts if layers else Experts(E, D, hidden=F, kind="silu")))
    trained, resumed = layers
    nn.init.normal_(trained.experts.up)
    nn.init.normal_(trained.experts.down)
    trained.router.before_training(TEXT)

    def results(layer: MoELayer) -> list[Any]:
        """Return what the layer computes in training and in evaluation. Then let its router learn from a step."""
        seed_all(0)
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
        hold(equal, "a resumed router decides otherwise; keep all state in parameters and persistent buffers")
