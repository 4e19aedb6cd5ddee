"""Metrics of quality on validation text, without and with the capacity limit of training, and on test text."""

from moe.metrics.metric import Metric

VALIDATION = (
    Metric(
        "val/loss",
        "-mean ln p(next token)",
        "Cross-entropy of the validation tokens. No capacity limit, no noise, no dropout.",
        "validation loss",
        "quality",
        unit="nats per token",
        better="lower",
        variants=("<domain>",),
        shown=("headline",),
        per_token=True,
        nonnegative=True,
    ),
    Metric(
        "val/loss_last_3",
        "mean of val/loss over the last 3 evaluations",
        "Depends less than the last value on the step at which training stopped. Null if there are fewer than three "
        "evaluations after the first step.",
        "validation loss, mean of the last 3 evaluations",
        "quality",
        unit="nats per token",
        better="lower",
        written=("end",),
        per_token=True,
        nonnegative=True,
    ),
    Metric(
        "val/loss_in_domain",
        "-mean ln p(next token), domains in data.train_domains",
        "`val/loss` over the domains whose text trains. Absent if all domains train, like `val/loss_out_of_domain`.",
        "validation loss in the domains that train",
        "quality",
        unit="nats per token",
        better="lower",
        shown=("headline",),
        per_token=True,
        nonnegative=True,
    ),
    Metric(
        "val/loss_out_of_domain",
        "-mean ln p(next token), other domains",
        "`val/loss` over the domains whose text does not train. In fine-tuning, its rise is what the model forgets.",
        "validation loss in the other domains",
        "quality",
        unit="nats per token",
        better="lower",
        shown=("headline",),
        per_token=True,
        nonnegative=True,
    ),
    Metric(
        "val/perplexity",
        "exp(val/loss)",
        "Exponential of the validation loss.",
        "validation perplexity",
        "quality",
        better="lower",
        shown=("headline", "tested"),
        noun="validation perplexity",
        per_token=True,
        nonnegative=True,
    ),
    Metric(
        "val/bits_per_byte",
        "Σ -log2 p(next token) / bytes of the text",
        "Bits that the model needs for a byte of the validation text in UTF-8. Unlike the loss and the perplexity of a "
        "token, it can be compared between tokenizers. Null if the tokens stand for no text.",
        "validation bits per byte",
        "quality",
        unit="bits per byte",
        better="lower",
        variants=("<domain>",),
        shown=("headline",),
        nonnegative=True,
    ),
    Metric(
        "val/accuracy",
        "mean [argmax p = next token]",
        "Share of validation tokens that the model predicts.",
        "validation accuracy",
        "quality",
        unit="share of tokens",
        better="higher",
        shown=("headline",),
        per_token=True,
        nonnegative=True,
    ),
)

TEST = tuple(
    metric._replace(
        name=metric.name.replace("val/", "test/"),
        formula=metric.formula.replace("val/", "test/"),
        meaning=f"`{metric.name}` on the test text, which nothing was trained on and nothing chosen by, after the last "
        "step. Absent with data.test_percent=0.",
        label=metric.label.replace("validation", "test"),
        group="test",
        written=("end",),
        shown=("headline",) if metric.name == "val/loss" else (),
        noun=metric.noun.replace("validation", "test"),
    )
    for metric in VALIDATION
    if "evaluation" in metric.written  # the test text is evaluated once
)

UNDER_LIMIT = (
    Metric(
        "val_capacity/loss",
        "-mean ln p(next token)",
        "`val/loss` with the capacity limit of training. Absent in a run without a limit, like all `val_capacity/...`. "
        "Beside runs with a limit, tables and reports give it there too: it is `val/loss`, and the drop rate is 0.",
        "validation loss under the capacity limit",
        "capacity limit",
        unit="nats per token",
        better="lower",
        per_token=True,
    ),
    Metric(
        "val_capacity/perplexity",
        "exp(val_capacity/loss)",
        "Exponential of `val_capacity/loss`.",
        "validation perplexity under the capacity limit",
        "capacity limit",
        better="lower",
        per_token=True,
    ),
    Metric(
        "val_capacity/drop_rate",
        "1 - kept / Σ c",
        "Share of assignments over capacity. The deciles show at which positions they are dropped.",
        "drop rate under the capacity limit",
        "capacity limit",
        unit="share of assignments",
        better="lower",
        variants=("decileN",),
    ),
    Metric(
        "val_capacity/unrouted_rate",
        "tokens without an expert / T",
        "Share of tokens that no expert processed.",
        "unrouted tokens under the capacity limit",
        "capacity limit",
        unit="share of tokens",
        better="lower",
    ),
)

ENTRIES = (*VALIDATION, *TEST, *UNDER_LIMIT)
