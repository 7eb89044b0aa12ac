"""A plan as text, at most 100 columns wide."""

import textwrap
from collections.abc import Sequence
from typing import Any

from cogview2.launch.plan.memory import KINDS

WIDTH = 100
_NO_SHARE = "its global batch has no equal share for more hosts"
_STEP = ("compute", "bubble", "reduce", "gather", "pipe", "update")


def amount(number: float) -> str:
    """Return a large number in three digits: 5.90 G, 906 G, 3.20e22."""
    for limit, unit in ((1e15, ""), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number:.2e}".replace("e+", "e") if not unit else f"{number / limit:.3g} {unit}"
    return f"{number:.3g}"


def seconds(value: float) -> str:
    """Return a time: 12 ms, 8.21 s, 3.1 h, 12 d."""
    for limit, unit, scale in ((86400 * 3, "d", 86400), (5400, "h", 3600), (90, "min", 60), (1, "s", 1)):
        if value >= limit:
            return f"{value / scale:.3g} {unit}"
    return f"{value * 1000:.3g} ms"


def size(value: float) -> str:
    """Return bytes in GB or TB."""
    return f"{value / 1e12:.3g} TB" if value >= 1e12 else f"{value / 1e9:.3g} GB"


def grid(rows: Sequence[Sequence[str]], indent: int = 2) -> list[str]:
    """Return rows as lines: the first column to the left, the others to the right."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return [
        " " * indent
        + "  ".join(
            cell.ljust(width) if k == 0 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _wrap(text: str, indent: int = 2, hanging: int = 4) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * hanging)


def _way(mark: str, one: dict[str, Any]) -> tuple[str, ...]:
    return (
        mark,
        f"{one['zero']}{' offload' if one['offload'] else ''}",
        str(one["pipe_stages"]),
        str(one["data_parallel"]),
        f"{one['micro_batch']} x {one['accumulation']}",
        "yes" if one["checkpointing"] else "no",
        f"{one['peak'] / 1e9:.1f}{'' if one['fits'] else ' !'}",
        seconds(one["step"]["total"]),
        f"{one['mfu']:.0%}",
        f"{one['step']['bubble_share']:.1%}" if one["pipe_stages"] > 1 else "-",
        f"{one['hours']:,.0f}",
        f"{one['gpu_hours']:,.0f}",
    )


def _ways(unit: dict[str, Any]) -> list[str]:
    """The recipe's own way, the best, and the best of each other kind; `!` marks what does not fit."""
    rows: list[tuple[str, ...]] = [
        ("", "ZeRO", "pp", "dp", "micro", "ckpt", "GB", "step", "MFU", "bubble", "hours", "GPU-hours")
    ]
    marked = [("recipe", unit["own"]), ("best", unit["recommended"])]
    others = [("", one) for one in unit["compared"] if one not in (unit["own"], unit["recommended"])]
    rows += [_way(mark, one) for mark, one in marked + others if one is not None]
    return grid(rows) if len(rows) > 1 else []


def _details(unit: dict[str, Any]) -> list[str]:
    """Memory by kind and the parts of a step, of the recipe's own way and of the best."""
    ways = [(name, unit[key]) for name, key in (("recipe", "own"), ("best", "recommended")) if unit[key]]
    if not ways:
        return []
    memory: list[tuple[str, ...]] = [("GB a rank", *KINDS, "worst at")]
    memory += [
        (name, *[f"{one['memory'][kind] / 1e9:.1f}" for kind in KINDS], one["moment"]) for name, one in ways
    ]
    steps: list[tuple[str, ...]] = [("seconds a step", *_STEP, "sent GB", "tokens/s")]
    steps += [
        (
            name,
            *[f"{one['step'][part]:.3g}" for part in _STEP],
            f"{sum(one['step']['volume'].values()) / 1e9:.1f}",
            f"{one['tokens_per_second']:,.0f}" if one["tokens_per_second"] else "-",
        )
        for name, one in ways
    ]
    return [*grid(memory), *grid(steps)]


def _unit(unit: dict[str, Any]) -> list[str]:
    tokens = f" of {amount(unit['tokens'])} tokens" if unit["tokens"] else ""
    lines = [
        f"{unit['unit']}: {amount(unit['parameters'])} parameters, {amount(unit['trained'])} trained; "
        f"{unit['steps']:,} steps x {unit['samples_per_step']:,} samples",
        f"  {amount(unit['samples'])} samples{tokens}, {amount(unit['model_flops'])} model FLOPs",
        *(
            [f"  on {unit['ranks']} ranks, {unit['idle_ranks']} stay idle: {_NO_SHARE}"]
            if unit["idle_ranks"]
            else []
        ),
        *_ways(unit),
        *_details(unit),
    ]
    if unit["recommended"] is not None:
        saved = unit["recommended"]["checkpoint"]
        lines += _wrap(
            f"checkpoint {size(saved['size'])} in {seconds(saved['seconds'])} "
            f"({unit['recommended']['checkpoint_share']:.1%} of the time), {size(saved['disk'])} with those kept and "
            f"the one being written; exported weights {size(saved['exported'])}"
        )
    lines += [line for reason in unit["why"] for line in _wrap(f"- {reason}")]
    return [*lines, ""]


def _sampling(plan: dict[str, Any]) -> list[str]:
    drawn, evaluated = plan["sampling"], plan["evaluate"]
    weights = drawn["weights"]
    transformers = sum(value for name, value in weights.items() if name != "vqvae")
    parts = ", ".join(f"{name} {seconds(value)}" for name, value in drawn["seconds"].items())
    how = {
        "together": "all models stay on the device",
        "in turn": f"they take turns on the device (sampling.offload=true), {seconds(drawn['swap_seconds'])} for each batch",
        "no": "not even one model at a time fits",
    }[drawn["fits"]]
    text = (
        f"weights in float16 {transformers / 1e9:.2f} GB (CogLM {weights['coglm'] / 1e9:.2f}, direct "
        f"{weights['direct'] / 1e9:.2f}, iterative {weights['iterative'] / 1e9:.2f}), VQVAE {weights['vqvae'] / 1e9:.2f}; "
        f"{drawn['batch']} pictures together: keys and values {size(drawn['cache'])}, activations "
        f"{size(drawn['activations'])}; {size(drawn['peak_together'])} with all models, "
        f"{size(drawn['peak_in_turn'])} one at a time: {how}"
    )
    return [
        "sampling and evaluate",
        *_wrap(text, hanging=2),
        *_wrap(f"a batch: {parts}; {seconds(drawn['seconds_per_picture'])} a picture", hanging=2),
        *_wrap(
            f"evaluate draws {evaluated['pictures']:,} pictures: {evaluated['hours']:.3g} hours, "
            f"{evaluated['gpu_hours']:,.3g} GPU-hours",
            hanging=2,
        ),
        "",
    ]


def _data(plan: dict[str, Any]) -> list[str]:
    data = plan["data"]
    each = f"{data['sample_bytes']:,} bytes a sample"
    if data["pictures"] is None:
        return [
            *_wrap(f"data: {each}; say --pictures N for shards, epochs and disk (the source is not read)", 0),
            "",
        ]
    epochs = ", ".join(f"{unit} {value:.3g}" for unit, value in data["epochs"].items())
    lines = _wrap(
        f"data: {data['pictures']:,} pictures, {data['shards']:,} shards, {size(data['size'])} ({each}); epochs: {epochs}",
        0,
    )
    return [*lines, *[line for problem in data["problems"] for line in _wrap(f"- {problem}")], ""]


def text(plan: dict[str, Any]) -> str:
    """Return the whole plan."""
    hardware, assumed = plan["hardware"], plan["assumptions"]
    hosts = f"{plan['hosts']} host{'s' if plan['hosts'] > 1 else ''}"
    kinds = ", ".join(f"{kind} {value:g}" for kind, value in hardware["tflops"].items())
    lines = [
        f"{plan['recipe']} on {plan['ranks']} ranks ({hosts}), {hardware['name']}: {hardware['memory_gb']:g} GB, "
        f"{hardware['memory_gb_s']:g} GB/s",
        f"TFLOP/s {kinds}; links {hardware['link_gb_s']:g} GB/s, network {hardware['network_gb_s']:g} GB/s a host",
        "",
    ]
    for unit in plan["units"]:
        lines += _unit(unit)
    lines += (_sampling(plan) if plan["evaluate"] is not None else []) + _data(plan)
    for way, name in (("own", "as the recipe says"), ("recommended", "in the best ways")):
        whole = plan["cascade"][way]
        if whole is not None:
            lines.append(
                f"in all, {name}: {whole['hours']:,.0f} hours ({whole['hours'] / 24:,.1f} days), "
                f"{whole['gpu_hours']:,.0f} GPU-hours, {size(whole['disk'])} of disk"
            )
    lines += [
        "",
        *_wrap(
            f"assumed: large matrix products at {assumed['matrix_efficiency']:.0%} of the peak (half of that at "
            f"{assumed['ramp_tokens']:g} tokens a micro batch), memory at {assumed['memory_efficiency']:.0%}, links at "
            f"{assumed['network_efficiency']:.0%}, {assumed['overlap']:.0%} of overlapped communication hidden, "
            f"{assumed['hop_near_us']:g} us a hop in a ring ({assumed['hop_far_us']:g} between hosts), "
            f"{assumed['zero3_layer_ms']:g} ms of host time for a layer under ZeRO 3, "
            f"{assumed['reserve_gb']:g} GB of each device for CUDA and NCCL, disk {assumed['disk_gb_s']:g} GB/s; GB are 10^9 "
            "bytes; step times were not measured on any of these devices (docs/scaling.md)",
            0,
            2,
        ),
    ]
    return "\n".join(lines)
