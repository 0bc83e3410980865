"""The model card of a run: what was trained on what, what it was compared with, and what may be claimed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml


def model_card(result: Mapping[str, Any], manifest: Mapping[str, Any], base_model: str | None) -> str:
    """``README.md`` of a model folder, in Markdown with the hub's metadata on top.

    Args:
        result: of ``result.json``.
        manifest: of ``manifest.json``.
        base_model: that an adapter belongs to; None for a whole model.
    """
    system = str(manifest.get("system", ""))
    metadata: dict[str, Any] = {
        "library_name": "transformers" if base_model is None else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["preceptor", f"preceptor-{system}"],
    }
    if base_model is not None and not Path(base_model).is_dir():  # a folder of this machine names nothing elsewhere
        metadata["base_model"] = base_model
    return "\n".join(
        [
            "---",
            yaml.safe_dump(metadata, sort_keys=False).strip(),
            "---",
            "",
            f"# A model trained by Preceptor's `{system}`",
            "",
            str(result.get("verdict", "")),
            "",
            *_table(result),
            "## How it was made",
            "",
            *_facts(manifest),
            "",
            "```bash",
            f"preceptor run {system} --config config.yaml --seed {manifest.get('seed')}",
            "```",
            "",
        ]
    )


def _table(result: Mapping[str, Any]) -> Iterator[str]:
    """The short table of methods, where the result has one."""
    methods = result.get("arms") or {}
    metrics = [metric for metric in result.get("table", []) if any(metric in own for own in methods.values())]
    if not metrics:
        return
    yield "## Measured"
    yield ""
    yield f"Means with 95 % intervals over {len(result.get('seeds', []))} seed(s)."
    yield ""
    yield f"| method | {' | '.join(metric.replace('_', ' ') for metric in metrics)} |"
    yield f"|---|{'---|' * len(metrics)}"
    for name, own in methods.items():
        yield f"| {name.replace('_', ' ')} | {' | '.join(_cell(own.get(metric)) for metric in metrics)} |"
    yield ""


def _cell(estimate: Mapping[str, Any] | None) -> str:
    if estimate is None or estimate.get("mean") is None:
        return ""
    interval = "" if estimate.get("low") is None else f" [{estimate['low']:.4g}, {estimate['high']:.4g}]"
    return f"{estimate['mean']:.4g}{interval}"


def _facts(manifest: Mapping[str, Any]) -> Iterator[str]:
    environment, code = manifest.get("environment", {}), manifest.get("code", {})
    yield f"- Preceptor {environment.get('preceptor')}, commit {code.get('commit')}"
    yield f"- torch {environment.get('torch')}, transformers {environment.get('transformers')}"
    yield f"- seed {manifest.get('seed')}, device {manifest.get('device')}, {environment.get('threads')} thread(s)"
