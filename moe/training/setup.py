"""Create everything that a run needs before its first training step: data, model, optimizers, devices."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from jaxtyping import Int
from torch import Tensor, nn

from moe.checks import ConfigError, first_line, require
from moe.config.classes import build
from moe.config.schema import Config
from moe.data.blocks import Batch, Prepared, batch, of_domains, prepare
from moe.data.labels import IGNORED, next_token
from moe.model.causal_lm import MoEConfig, MoEForCausalLM, load_model
from moe.model.continued import check_continued, continued
from moe.model.cost import TrainingFlops, reset_peak_memory
from moe.model.imported_checkpoint import read_checkpoint
from moe.model.parts import Parts, freeze, learning_routers, parts
from moe.model.replay import check_tokenizer
from moe.model.upcycle import upcycle
from moe.routers.base import Router
from moe.routers.seeding import seed_all
from moe.routing.decision import TrainingText
from moe.runs.collapse import quiet_steps
from moe.training import parallel, process
from moe.training.graphs import Graphs
from moe.training.optim import build_optimizers, scale_learning_rates
from moe.training.probe import Routes, routes
from moe.training.schedules import Schedule, knob_settings
from moe.training.watch import LoadWatch, can_collapse


class Training(NamedTuple):
    """The objects that a run trains with.

    Only the model, the optimizers, `ahead`, `watch` and `flops` change during training.

    process: the settings of the process, for the run record.
    model: the plain model, which is evaluated and saved.
    wrapped: the module that distributes `model` over the ranks (for example DDP). It has the same parameters. On one
        rank it is `model` itself.
    forward: `wrapped`, compiled if the configuration asks for it. A training step calls it.
    graphs: what runs passes as CUDA graphs. None where that is not possible from the start, or not wanted.
    parts: the trainable parameters of all routers ("router") and of all experts ("experts"), for norms and updates.
    ahead: the micro-batches of the next step, by its number. The host makes them while it would wait for a GPU.
    base: how the model routes the compared tokens before the first step, if it starts from a checkpoint. A resume
        computes it again, before it loads the weights.
    learning: the routers, of the model and of its adapter, that learn without a gradient. A frozen one does not.
    watch: notices when the routing of a layer collapses.
    flops: counts the FLOPs of all training steps.
    """

    config: Config
    process: dict[str, Any]
    accelerator: Accelerator
    data: Prepared
    schedule: Schedule
    model: MoEForCausalLM
    wrapped: nn.Module
    forward: Callable[..., Any]
    graphs: Graphs | None
    optimizers: list[torch.optim.Optimizer]
    parts: Parts
    ahead: dict[int, list[Batch]]
    learning: frozenset[Router]
    base: Routes | None
    watch: LoadWatch
    flops: TrainingFlops

    @property
    def routers(self) -> list[Router]:
        """The router of each MoE layer."""
        return [layer.router for layer in self.model.moe_layers]

    @property
    def adapter_routers(self) -> list[Router]:
        """The router of each MoE layer that an adapter has put beside those of the model."""
        return [layer.router for layer in self.model.beside_layers]


def set_up(config: Config) -> Training:
    """Create all objects that a run trains with, in their state before the first step.

    Raises ConfigError for `precision=auto`, which `moe.training.precision.choose` replaces.
    """
    require(config.precision != "auto", "precision", "auto", "fp32 or bf16 here; only a training run can choose")
    settings = process.configure(threads=config.threads, matmul_precision=config.matmul_precision)
    AcceleratorState._reset_state()  # otherwise an earlier run in this process decides the precision
    accelerator = Accelerator(mixed_precision="bf16" if config.precision == "bf16" else "no")
    reset_peak_memory(accelerator.device)
    data = prepare_data(config)
    schedule = build(config.schedule, "schedule", trusted=True)
    model = build_model(config, vocab_size=len(data.tokenizer))
    check_tokenizer(model.moe_layers, data.tokenizer)
    routers = [layer.router for layer in (*model.moe_layers, *model.beside_layers)]
    learning = learning_routers(model, routers, str(config.trains))
    wrapped = parallel.distribute(model, accelerator, expert_parallel=config.expert_parallel)
    optimizers = build_optimizers(model, config.optimizer)
    scale_learning_rates(config, optimizers, step=0)
    tell_text(routers, data)
    options: dict[str, Any] = {"fallback_random": True}  # draws the same noise and dropout as without compilation
    forward = torch.compile(wrapped, options=options) if config.compile else wrapped
    return Training(
        config=config,
        process=settings,
        accelerator=accelerator,
        data=data,
        schedule=schedule,
        model=model,
        wrapped=wrapped,
        forward=forward,
        graphs=_graphs(config, model, accelerator.device),
        optimizers=optimizers,
        parts=parts(model),
        ahead={},
        learning=learning,
        base=_base_routes(config, model, data, schedule),
        watch=LoadWatch(
            [layer.router.num_experts for layer in model.moe_layers],
            watched=[can_collapse(layer.router) for layer in model.moe_layers],
            quiet=quiet_steps(config.steps, config.optimizer.warmup),
        ),
        flops=TrainingFlops(model, config.data.seq_len),
    )


def tell_text(routers: list[Router], data: Prepared) -> None:
    """Call `before_training` of these routers. Only if one has it is the training text read."""
    listening = [router for router in routers if type(router).before_training is not Router.before_training]
    if listening:
        text = TrainingText(token_counts(data), data.domains)
        for router in listening:
            router.before_training(text)


def _graphs(config: Config, model: MoEForCausalLM, device: torch.device) -> Graphs | None:
    """Return what runs passes as CUDA graphs, which cannot record an exchange, a compilation, or a random state."""
    single = parallel.layout(expert_parallel=config.expert_parallel) == "single"
    fits = device.type == "cuda" and single and not config.compile and not config.gradient_checkpointing
    return Graphs(model) if config.cuda_graph and fits else None


def _base_routes(config: Config, model: MoEForCausalLM, data: Prepared, schedule: Schedule) -> Routes | None:
    """Return how a model that starts from a checkpoint routes before the first step; None if nothing trains it."""
    if not config.has_base:
        return None
    return routes(model, data, temperature=knob_settings(config, schedule, 0)["temperature"])


def prepare_data(config: Config, *, trusted: bool = True) -> Prepared:
    """Return the prepared data of a configuration. They are read from the cache if it has them.

    `trusted`: the user wrote the configuration. Otherwise its data source must be a class of this project
    (`moe.config.classes.locate`), and the data must be in the cache. Raises ConfigError for text that cannot be used.
    """
    settings = config.data
    try:
        source = build(settings.source, "data.source", trusted=trusted)
        data = prepare(source, settings.blocks, cache=settings.cache, make=trusted)
        return data if settings.train_domains is None else of_domains(data, settings.train_domains)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(first_line(error)) from error


def build_model(config: Config, *, vocab_size: int | None = None) -> MoEForCausalLM:
    """Return the model of a configuration before training.

    With `model.dense` or `model.checkpoint`, it is made from that checkpoint, which has a vocabulary of its own.

    The weights depend only on the configuration, including its seed of initial weights, and on the checkpoint.
    Parameters that do not train (key `trainable`) need no gradient.
    """
    init_seed, _ = config.seeds
    seed_all(init_seed)
    settings = MoEConfig.of(config.model, config.router, vocab_size=vocab_size, seq_len=config.data.seq_len)
    if config.model.dense is not None:
        model = upcycle(settings, config.model)
    elif config.model.continues:
        model = continued(settings, config.model)
    else:
        checkpoint = None if config.model.checkpoint is None else read_checkpoint(config.model)
        model = MoEForCausalLM(settings, trusted=True, causal_lm=checkpoint)
    if config.adapter:
        attach_adapter(model, config)
    freeze(model, str(config.trains))
    model.model.gradient_checkpointing = config.gradient_checkpointing
    return model


def attach_adapter(model: MoEForCausalLM, config: Config) -> None:
    """Add the adapter of a configuration. Its library may have frozen parameters, which get their gradients back."""
    fixed = {p for p in model.parameters() if not p.requires_grad}
    model.attach(build(config.adapter, "adapter", trusted=True), config.adapter, trusted=True)
    for p in model.parameters():
        p.requires_grad_(p not in fixed)


def check_model(config: Config) -> None:
    """Raise ConfigError if the saved model to continue from, or the key `trainable`, does not fit the settings.

    The model is made without memory and weights.
    """
    if config.trainable is None and not config.model.continues:
        return
    settings = MoEConfig.of(config.model, config.router, vocab_size=config.model.num_experts, seq_len=1)
    if config.model.continues:
        check_continued(settings, config.model)
    if config.trainable is not None:
        with torch.device("meta"):
            model = MoEForCausalLM(settings, trusted=True)
            if config.adapter:
                attach_adapter(model, config)
        freeze(model, str(config.trains))


def model_of_run(folder: Path, config: Config, *, trusted: bool = False) -> MoEForCausalLM:
    """Return the model of a finished run in evaluation mode: the saved one, or what `observed` says it evaluated.

    Raises ValueError for files that are missing, torn or wrong.
    """
    if (folder / "model").is_dir() or not observed(config):
        return load_model(folder / "model", trusted=trusted)
    return build_model(config).eval()


def observed(config: Config) -> bool:
    """Return whether a run only evaluates an imported model, so that its model is the checkpoint."""
    return config.steps == 0 and config.model.checkpoint is not None


def token_counts(data: Prepared) -> Int[Tensor, " V"]:
    """Count how often each token id occurs in the training blocks."""
    counts = torch.zeros(len(data.tokenizer), dtype=torch.long)
    for ids in data.train.parts("input_ids", 4096):
        counts += torch.from_numpy(ids).flatten().bincount(minlength=len(counts))
    return counts


def unigram_perplexity(data: Prepared) -> float:
    """Return the validation perplexity of a model that knows only how often each token occurs in the training text.

    One is added to each count, so that no token has the probability 0.
    """
    counts = token_counts(data) + 1
    targets = torch.zeros_like(counts)
    for first in range(0, len(data.val), 256):
        labels = next_token(batch(data.val, range(first, min(first + 256, len(data.val)))).labels)
        targets += labels[labels != IGNORED].bincount(minlength=len(counts))
    nats = -(counts / counts.sum()).double().log()
    return math.exp((targets * nats).sum().item() / targets.sum().item())


def remarks(config: Config) -> list[str]:
    """Return what the source of a configuration's text says about it, such as an optional domain that is missing."""
    source = build(config.data.source, "data.source", trusted=True)
    return list(getattr(source, "remarks", list)())
