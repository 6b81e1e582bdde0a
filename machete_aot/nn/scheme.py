# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint's ``quantization_config`` says: how each module is quantised, and which are not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UnsupportedError
from . import awq, compressed_tensors, gptq
from .checkpoint import PREPACKED_INDEX, read_json
from .weights import QuantizedWeights

_FORMATS = {"gptq": gptq, "awq": awq, "compressed-tensors": compressed_tensors}


@dataclass(frozen=True)
class Scheme:
    """How one module is quantised. ``version``: of the GPTQ format."""

    method: str
    bits: int
    group_size: int
    symmetric: bool = False
    version: int = 1

    @property
    def needed(self) -> tuple[str, ...]:
        """The last parts of the names of tensors that every such module has."""
        return tuple(_FORMATS[self.method].NEEDED)

    @property
    def optional(self) -> tuple[str, ...]:
        return tuple(_FORMATS[self.method].OPTIONAL)

    def convert(self, tensors: Mapping[str, Any]) -> QuantizedWeights:
        """Weights of a module's tensors, by the last parts of their names."""
        options: dict[str, Any] = {"bits": self.bits, "group_size": self.group_size}
        if self.method == "gptq":
            return gptq.from_gptq(**tensors, **options, version=self.version, symmetric=self.symmetric)
        if self.method == "awq":
            return awq.from_awq(**tensors, **options)
        return compressed_tensors.from_compressed_tensors(**tensors, **options)


class QuantizationConfig:
    """The rules of one checkpoint. Raises UnsupportedError for a method or variant that is not read."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.method = str(config.get("quant_method", "")).lower()
        if self.method not in _FORMATS:
            raise UnsupportedError(
                f"checkpoints of quant_method {self.method!r}; there are {', '.join(_FORMATS)}, and replace_hqq for HQQ"
            )
        self._config = config
        self._rules: list[tuple[Sequence[str], Scheme]] = []
        self._excluded: list[str] = []
        {"gptq": self._read_gptq, "awq": self._read_awq, "compressed-tensors": self._read_compressed}[self.method]()

    @classmethod
    def find(cls, folder: str | Path) -> QuantizationConfig:
        """From config.json's quantization_config, or from quantize_config.json, as older GPTQ checkpoints have it."""
        folder = Path(folder)
        path = folder / "config.json"
        if not folder.is_dir():
            raise CheckpointError(
                f"there is no folder {folder}; wanted a downloaded checkpoint: of one on the Hugging Face Hub pass "
                "what huggingface_hub.snapshot_download(...) returns"
            )
        if (folder / PREPACKED_INDEX).is_file():
            raise CheckpointError(f"{folder} was written by save_prepacked; read it with load_prepacked")
        config = read_json(path).get("quantization_config") if path.is_file() else None
        if config is None and (folder / "quantize_config.json").is_file():
            config = {"quant_method": "gptq", **read_json(folder / "quantize_config.json")}
        if config is None and not path.is_file():
            raise CheckpointError(
                f"{folder} has no config.json; wanted the folder of a GPTQ, AWQ or compressed-tensors checkpoint"
            )
        if not isinstance(config, dict):
            raise CheckpointError(f"{path} has no quantization_config: the checkpoint in {folder} is not quantised")
        return cls(config)

    @property
    def marker(self) -> str:
        """The last part of the name of the tensor that tells a quantised module."""
        return "weight_packed" if self.method == "compressed-tensors" else "qweight"

    def excludes(self, name: str, kind: str = "Linear") -> bool:
        """Whether the config says that this module, of a class of that name, is not quantised."""
        return _matches(self._excluded, name, kind) or (self.method == "gptq" and self._dynamic(name) is None)

    def scheme(self, name: str, kind: str = "Linear") -> Scheme:
        """How this module is quantised, if it is. Raises CheckpointError where no rule of the config covers it."""
        for targets, scheme in sorted(self._rules, key=lambda rule: kind in rule[0]):  # names before classes
            if not targets or _matches(targets, name, kind):
                return self._overridden(scheme, name)
        raise CheckpointError(
            f"{name} is quantised in the checkpoint, but no rule of its quantization_config covers it"
        )

    def _read_gptq(self) -> None:
        form = self._config.get("checkpoint_format", "gptq")
        if form not in ("gptq", "gptq_v2"):
            raise UnsupportedError(f"GPTQ checkpoints of checkpoint_format {form!r}; there are gptq and gptq_v2")
        bits, group = int(self._config.get("bits", 4)), int(self._config.get("group_size", -1))
        version = 2 if form == "gptq_v2" else 1
        self._rules = [((), Scheme("gptq", bits, group, bool(self._config.get("sym", False)), version))]
        self._excluded = list(self._config.get("modules_to_not_convert") or ())
        if self._config.get("lm_head") is False:
            self._excluded.append("lm_head")

    def _read_awq(self) -> None:
        version = str(self._config.get("version", "gemm")).lower()
        if version != "gemm":
            raise UnsupportedError(f"AWQ checkpoints of version {version!r}; only gemm is read")
        bits = int(self._config.get("bits", self._config.get("w_bit", 4)))
        group = int(self._config.get("group_size", self._config.get("q_group_size", 128)))
        self._rules = [((), Scheme("awq", bits, group))]
        self._excluded = list(self._config.get("modules_to_not_convert") or ())

    def _read_compressed(self) -> None:
        whole = self._config.get("format")
        for name, group in (self._config.get("config_groups") or {}).items():
            form = group.get("format") or whole
            weights = group.get("weights") or {}
            if form != "pack-quantized" or weights.get("type", "int") != "int":
                raise UnsupportedError(
                    f"compressed-tensors group {name}: {weights.get('type', 'int')} weights of format {form!r}; "
                    "only integers of format pack-quantized are read"
                )
            if group.get("input_activations"):
                raise UnsupportedError(f"compressed-tensors group {name} quantises activations too")
            strategy = weights.get("strategy") or "tensor"
            if strategy not in ("group", "channel", "tensor"):
                raise UnsupportedError(f"compressed-tensors group {name}: strategy {strategy!r}")
            size = int(weights["group_size"]) if strategy == "group" else -1
            scheme = Scheme(self.method, int(weights["num_bits"]), size, bool(weights.get("symmetric", True)))
            self._rules.append((tuple(group.get("targets") or ()), scheme))
        self._excluded = list(self._config.get("ignore") or ())

    def _dynamic(self, name: str) -> Mapping[str, Any] | None:
        """Overrides that GPTQ's "dynamic" has for a module; None where it says that the module is not quantised."""
        for pattern, overrides in (self._config.get("dynamic") or {}).items():
            sign, text = (pattern[0], pattern[2:]) if pattern[:2] in ("+:", "-:") else ("+", pattern)
            if re.match(text, name):
                return None if sign == "-" else dict(overrides or {})
        return {}

    def _overridden(self, scheme: Scheme, name: str) -> Scheme:
        if self.method != "gptq":
            return scheme
        found = self._dynamic(name) or {}
        names = {"bits": "bits", "group_size": "group_size", "sym": "symmetric"}
        return replace(scheme, **{field: found[key] for key, field in names.items() if key in found})


def _matches(rules: Iterable[str], name: str, kind: str) -> bool:
    """Whether a rule names the module: "re:" and a pattern, its class, or parts of its dotted name in a row."""
    for rule in rules:
        if rule.startswith("re:"):
            if re.match(rule[3:], name):
                return True
        elif rule == kind or f".{rule}." in f".{name}.":
            return True
    return False
