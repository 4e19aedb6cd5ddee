"""The routers of a run: their classes and settings, whether they fit its other settings, and which keys they ignore."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moe.checks import ConfigError, require, unknown
from moe.config import layer_experts, layer_routers
from moe.config.checkpoints import replayed
from moe.config.classes import build, locate
from moe.config.keys import DEFAULTED, DENSE_IGNORES, OFF, RATES
from moe.config.schema import Config


def specs(config: Config) -> list[tuple[dict[str, Any], int]]:
    """Return class and settings of each router, with the number of its experts, each pair once.

    First comes `router` with the number of the first layer that has it, and with `model.num_experts` if none does.
    """
    of_layers = layer_routers.specs(config.model.routers, config.router)
    pairs = [(of_layers.get(layer, config.router), config.model.experts_of(layer)) for layer in config.model.moe_layers]
    unique = list({(id(spec), experts): (spec, experts) for spec, experts in pairs}.values())
    unique.sort(key=lambda pair: pair[0] is not config.router)
    return list({repr(pair): pair for pair in unique or [(config.router, config.model.num_experts)]}.values())


def build_all(config: Config) -> list[Any]:
    """Return a router of each of `specs`, without memory for its parameters. This imports torch."""
    import torch

    routers = []
    with torch.device("meta"):
        for spec, experts in specs(config):
            with _naming(config, spec, experts):
                routers.append(build(spec, "router", config.model.dim, experts, trusted=True))
    return routers


@contextmanager
def _naming(config: Config, spec: dict[str, Any], experts: int) -> Iterator[None]:
    """Let a ConfigError about a router of `specs` begin with the keys that give it only to some layers."""
    try:
        yield
    except ConfigError as error:
        routers = "" if spec is config.router else f"model.routers={config.model.routers}: "
        numbers = layer_experts.named(config.model.experts_by_layer, experts, config.model.num_experts)
        raise ConfigError(f"{routers}{numbers}{error}") from error


def check(config: Config) -> None:
    """Raise ConfigError for wrong keys or ranges of the router, and for a schedule or data that do not fit it."""
    config.check_adapter()
    routers = build_all(config)
    for router, (spec, experts) in zip(routers, specs(config), strict=True):
        with _naming(config, spec, experts):
            _check_one(config, router)
    allowed = "routers that all run once in a layer, or all equally often"
    require(len({len(each.chain) for each in routers}) == 1, "model.routers", config.model.routers, allowed)
    temperatures = {spec["temp"] for spec, _ in specs(config) if "temp" in spec}
    allowed = "routers with one temp, because the temperature is one number for all layers"
    require(len(temperatures) < 2, "model.routers", config.model.routers, allowed)
    precision, computes = config.model.router_precision, not all(each.uses_ids for each in routers)
    allowed = "fp32, because this router only looks experts up"
    require(computes or precision == "fp32", "model.router_precision", precision, allowed)
    rounds = any(True for each in routers for _ in each.parameters())
    allowed = "fp32 or bf16, because this router has no parameters to round"
    require(rounds or precision != "bf16_weights", "model.router_precision", precision, allowed)
    if config.schedule.get("knob") == "noise" and all("noise" in each.ignored_keys() for each in routers):
        raise ConfigError("schedule.knob=noise: this router ignores noise; use another router")
    if config.schedule.get("knob") == "temperature" and not any(each.schedulable for each in routers):
        raise ConfigError(
            "schedule.knob=temperature: this router has no temperature; use router=temperature or router=gumbel"
        )
    schedule = build(config.schedule, "schedule", trusted=True)
    for knob, setting in (("temperature", config.temperature), ("noise", config.noise)):
        schedule(knob, setting, 0.0)


def _check_one(config: Config, router: Any) -> None:
    """Raise ConfigError for a router that does not fit this run."""
    router.check_class()
    if router.replays is not None:
        allowed = "used without model.dense and model.checkpoint"
        plain = config.model.dense is None and config.model.checkpoint is None
        require(plain, "router._target_", config.router["_target_"], allowed)
        replayed.check(router.replays[0], config.model, seq_len=config.data.seq_len)
    if getattr(locate(config.data.source["_target_"], "data.source", trusted=True), "conversations", False):
        router.require_documents_apart()
    source = config.build_source()
    if hasattr(source, "present"):  # of other sources the domains are known when the text has been read
        router.check_domains(source.present())
    allowed = "feed_forward, because this router adds a share of what it reads to the output of the layer"
    before = config.model.router_input
    require(before == "feed_forward" or not router.adds_output, "model.router_input", before, allowed)
    settings = OFF.keys() | router.setting_keys()
    for key in (router.ignores | router.ignores_without_capacity) - settings:
        raise unknown(f"key in ignores of {type(router).__name__}", key, settings)
    if config.capacity is not None and not config.is_dense and "capacity" not in router.ignored_keys():
        most = router.num_experts / (router.fixed_k or 1)
        allowed = f"null, or below {most:g}: from there on an expert has room for all tokens, so that none is dropped"
        require(config.capacity < most, "capacity", config.capacity, allowed)


def ignored_keys(config: Config) -> frozenset[str]:
    """Return the keys that change nothing in this run.

    These are the keys of `OFF` and of the router itself that the router ignores, such as router.gate, `drop` if there
    is no capacity limit, and those of `DEFAULTED` that this optimizer does not use, or that concern weights which this
    model does not have. If no layer is a Mixture of Experts, they are all keys of `OFF`, and the groups in
    `DENSE_IGNORES`. Otherwise this imports torch.
    """
    muon = config.optimizer.muon_lr is not None
    unused = {"optimizer.experts_lr"} if muon else {"optimizer.momentum", "optimizer.expert_step"}
    if muon and config.optimizer.router_lr is None:  # with a value, AdamW trains the routers
        unused.add("optimizer.router_lr")
    frozen = config.without_effect()
    unused |= frozen & DEFAULTED
    if config.is_dense:
        return frozenset((*OFF, *DENSE_IGNORES, *RATES, "optimizer.expert_step", *unused))
    router, *of_layers = routers = build_all(config)
    if all(each.num_experts == 1 for each in routers):
        unused.add("optimizer.expert_step")
    if not any(p.requires_grad for each in routers for p in each.parameters()) and not router.weights_elsewhere:
        unused.add("optimizer.router_lr")
    used = [key for each in of_layers for key in OFF.keys() - each.ignored_keys()]
    alike = [each.ignored_keys() for each in routers if type(each) is type(router)]
    ignored = (frozenset.intersection(*alike) - {*used}) | frozen
    if config.capacity is None or "capacity" in ignored:
        ignored |= {"drop"} | router.ignores_without_capacity
    return frozenset(ignored & {*OFF, *(f"router.{name}" for name in config.router)} | unused)


def settings_in_effect(config: Config) -> dict[str, Any]:
    """Return `identity`, with the values that mean the same as the given ones. This imports torch, unless dense."""
    routers = [] if config.is_dense else build_all(config)
    same, *of_layers = [each.same_as for each in routers if type(each) is type(routers[0])] or [{}]
    shared = [name for name, value in same.items() if all(each.get(name, ...) == value for each in of_layers)]
    equivalent = {f"router.{name}": same[name] for name in shared}
    seeds = dict(zip(("init_seed", "data_seed"), config.seeds, strict=True)) | {"seed": None}
    settings = config.identity() | equivalent | seeds | {"trainable": str(config.trains)}
    if settings[layer_experts.KEY] is not None:  # two spellings may give the layers the same numbers
        settings |= {layer_experts.KEY: None, "model.num_experts": config.model.experts_of_layers}
    return settings


def is_causal(config: Config) -> bool:
    """Return whether the routing of all layers is causal, see `Router.is_causal`. This imports torch."""
    return all(each.is_causal(capacity=config.capacity, drop=config.drop) for each in build_all(config))
