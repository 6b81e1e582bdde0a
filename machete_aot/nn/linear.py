# SPDX-License-Identifier: Apache-2.0
"""MacheteLinear: a linear layer of prepacked quantised weights, in place of ``torch.nn.Linear``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from ..config import BLOCK_K
from ..errors import ArgumentError, CheckpointError, UnsupportedError
from ..layout import layout_for, packed_shape
from ..overlap import enabled
from ..permute import permute_columns
from ..prepack import A_DTYPES, prepack_b
from ..product import gemm
from ..scalar_type import ScalarType, scalar_type, u4b8
from . import awq, compressed_tensors, gptq, hqq
from .nearest import round_to_nearest
from .weights import QuantizedWeights

STATE_FORMAT = 1  # of the extra state
_is_compiling = torch.compiler.is_compiling
_ZEROS = ("none", "int", "float")


class Sharding(Protocol):
    """What a layer that holds a part of the weights does to its input and output; see ``parallel.py``."""

    out_dtype: torch.dtype | None

    def before(self, x: torch.Tensor) -> torch.Tensor: ...

    def after(self, y: torch.Tensor) -> torch.Tensor: ...


class MacheteLinear(torch.nn.Module):
    """``y = x @ weights + bias`` by ``machete_aot.gemm``: x [..., in_features], y [..., out_features], both ``dtype``.

    Buffers, all on one device: ``qweight`` int32, as ``prepack_b`` returns it; ``scales`` [groups, N] in ``dtype``;
    ``zeros`` [groups, N] uint8 or in ``dtype``, or None; ``bias`` [N] in ``dtype`` or None; ``perm`` int32 [K] or None,
    the order in which the activations are taken (act-order). The extra state of ``state_dict`` is a uint8 tensor of
    JSON with the layout's name and version and everything else that gives the buffers their meaning; loading a
    ``state_dict`` of another layout, version or type raises CheckpointError. No gradients.

    ``activation`` "swiglu": the N = 2 * out_features columns are gate and up interleaved, see ``prepack_gate_up``.
    ``batch_invariant``: an attribute, passed on to ``gemm``.

    The constructor leaves the buffers uninitialised; the ``from_...`` methods fill them.
    """

    qweight: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    bias: torch.Tensor | None
    perm: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        b_type: ScalarType = u4b8,
        group_size: int | None = 128,
        *,
        zeros: str = "none",
        bias: bool = False,
        act_order: bool = False,
        activation: str | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        """``zeros``: "none", "int" (uint8) or "float" (in ``dtype``). Raises ArgumentError and UnsupportedError."""
        super().__init__()
        if dtype not in A_DTYPES.values():
            raise ArgumentError(f"dtype must be torch.bfloat16 or torch.float16, got {dtype}")
        if zeros not in _ZEROS:
            raise ArgumentError(f'zeros must be "none", "int" or "float", got {zeros!r}')
        if activation not in (None, "swiglu"):
            raise ArgumentError(f"activation must be None or 'swiglu', got {activation!r}")
        self.in_features, self.out_features, self.b_type, self.activation = (
            in_features,
            out_features,
            b_type,
            activation,
        )
        self.group_size = _checked_group(group_size, in_features)
        self.batch_invariant = False
        self.sharding: Sharding | None = None  # what one rank's part needs of the others
        self.is_part = False  # whether this is one rank's part of a layer
        n = self.columns
        groups = 1 if self.group_size == -1 else -(-in_features // self.group_size)

        def buffer(name: str, shape: tuple[int, ...], kind: torch.dtype, wanted: bool = True) -> None:
            self.register_buffer(name, torch.empty(shape, dtype=kind, device=device) if wanted else None)

        buffer("qweight", packed_shape(n, in_features, b_type), torch.int32)
        buffer("scales", (groups, n), dtype)
        buffer("zeros", (groups, n), torch.uint8 if zeros == "int" else dtype, zeros != "none")
        buffer("bias", (n,), dtype, bias)
        buffer("perm", (in_features,), torch.int32, act_order)

    @property
    def columns(self) -> int:
        """N of the product: twice the outputs where the activation takes two for each."""
        return self.out_features if self.activation is None else 2 * self.out_features

    @property
    def zeros_kind(self) -> str:
        """ "none", "int" or "float"."""
        if self.zeros is None:
            return "none"
        return "int" if self.zeros.dtype == torch.uint8 else "float"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] of the scales' dtype -> [..., out_features]. Raises what ``gemm`` raises."""
        sharding = self.sharding
        if sharding is not None:
            x = sharding.before(x)
        if self.perm is not None:
            # A compiler makes torch's gather a part of the kernel before it, which it cannot with ours.
            x = x.index_select(-1, self.perm) if _is_compiling() else permute_columns(x, self.perm)
        out_dtype = None if sharding is None else sharding.out_dtype
        y = gemm(
            x, self.qweight, self.b_type, self.scales, self.zeros, self.group_size, self.bias,
            activation=self.activation, batch_invariant=self.batch_invariant, out_dtype=out_dtype,
            overlap=enabled() if _is_compiling() else None,  # no graph computes these buffers
        )  # fmt: skip
        return y if sharding is None else sharding.after(y)

    @classmethod
    def from_weights(cls, weights: QuantizedWeights, dtype: torch.dtype = torch.bfloat16) -> MacheteLinear:
        """A layer of these weights, prepacked where they are. Scales, floating zeros, bias: rounded to ``dtype``."""
        qweight = prepack_b(weights.w_q, weights.b_type, dtype, k=weights.k)
        return cls.from_packed(
            qweight, weights.b_type, weights.scales, weights.zeros, weights.k, weights.group_size,
            weights.bias, weights.perm, dtype=dtype,
        )  # fmt: skip

    @classmethod
    def from_packed(
        cls,
        qweight: torch.Tensor,
        b_type: ScalarType,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        in_features: int,
        group_size: int | None,
        bias: torch.Tensor | None = None,
        perm: torch.Tensor | None = None,
        *,
        activation: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MacheteLinear:
        """A layer of weights that are prepacked already: the buffers as they are, floating ones in ``dtype``.

        ``dtype`` None: that of the scales. Raises ArgumentError where the shapes do not fit together, and where
        ``perm`` is not a permutation.
        """
        dtype = dtype or scales.dtype
        kind = "none" if zeros is None else "float" if zeros.is_floating_point() else "int"
        n = scales.shape[1]
        layer = cls(
            in_features, n if activation is None else n // 2, b_type, group_size, zeros=kind, bias=bias is not None,
            act_order=perm is not None, activation=activation, dtype=dtype, device="meta",
        )  # fmt: skip
        given = {"qweight": qweight, "scales": scales, "zeros": zeros, "bias": bias, "perm": perm}
        for name, tensor in given.items():
            if tensor is None:
                continue
            wanted = getattr(layer, name)
            if tensor.shape != wanted.shape:
                raise ArgumentError(f"{name} must have shape {tuple(wanted.shape)}, got {tuple(tensor.shape)}")
            setattr(layer, name, tensor.detach().to(wanted.dtype).contiguous())
        if layer.perm is not None and not is_permutation(layer.perm):
            raise ArgumentError(f"perm must hold each number from 0 to {in_features - 1} once")
        return layer

    @classmethod
    def from_float(
        cls,
        linear: torch.nn.Linear,
        b_type: ScalarType = u4b8,
        group_size: int | None = 128,
        symmetric: bool | None = None,
    ) -> MacheteLinear:
        """``linear`` quantised by rounding to nearest, without calibration: see ``nearest.round_to_nearest``."""
        weight = linear.weight
        dtype = weight.dtype if weight.dtype in A_DTYPES.values() else torch.bfloat16
        bias = None if linear.bias is None else linear.bias.detach()
        return cls.from_weights(round_to_nearest(weight.to(dtype), b_type, group_size, symmetric, bias), dtype)

    @classmethod
    def from_gptq(cls, *tensors: Any, dtype: torch.dtype = torch.bfloat16, **options: Any) -> MacheteLinear:
        """A layer of a GPTQ checkpoint; arguments are those of ``gptq.from_gptq``."""
        return cls.from_weights(gptq.from_gptq(*tensors, **options), dtype)

    @classmethod
    def from_awq(cls, *tensors: Any, dtype: torch.dtype = torch.bfloat16, **options: Any) -> MacheteLinear:
        """A layer of an AWQ checkpoint; arguments are those of ``awq.from_awq``."""
        return cls.from_weights(awq.from_awq(*tensors, **options), dtype)

    @classmethod
    def from_compressed_tensors(
        cls, *tensors: Any, dtype: torch.dtype = torch.bfloat16, **options: Any
    ) -> MacheteLinear:
        """A layer of a compressed-tensors checkpoint; arguments are those of its ``from_compressed_tensors``."""
        return cls.from_weights(compressed_tensors.from_compressed_tensors(*tensors, **options), dtype)

    @classmethod
    def from_hqq(cls, *tensors: Any, dtype: torch.dtype = torch.bfloat16, **options: Any) -> MacheteLinear:
        """A layer of an HQQ model; arguments are those of ``hqq.from_hqq``."""
        return cls.from_weights(hqq.from_hqq(*tensors, **options), dtype)

    def description(self) -> dict[str, Any]:
        """Everything that gives the buffers their meaning, as plain data: the extra state."""
        layout = layout_for(self.b_type)
        return {
            "format": STATE_FORMAT,
            "layout": layout.name,
            "layout_version": layout.version,
            "b_type": self.b_type.name,
            "group_size": self.group_size,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "zeros": self.zeros_kind,
            "bias": self.bias is not None,
            "act_order": self.perm is not None,
            "activation": self.activation,
        }

    @classmethod
    def from_description(
        cls, description: Mapping[str, Any], dtype: torch.dtype, device: torch.device | str | None = None
    ) -> MacheteLinear:
        """A layer as ``description`` says, its buffers uninitialised. Raises CheckpointError for another layout."""
        check_layout(description)
        return cls(
            description["in_features"], description["out_features"], scalar_type(description["b_type"]),
            description["group_size"], zeros=description["zeros"], bias=description["bias"],
            act_order=description["act_order"], activation=description["activation"], dtype=dtype, device=device,
        )  # fmt: skip

    def get_extra_state(self) -> torch.Tensor:
        """``description`` as JSON in a uint8 tensor, so that safetensors can hold it."""
        return torch.frombuffer(bytearray(json.dumps(self.description(), sort_keys=True).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Checks what ``get_extra_state`` gave. Raises CheckpointError."""
        self._check_state(state)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        state = state_dict.get(f"{prefix}_extra_state")
        if state is not None:
            self._check_state(state)  # before any buffer is overwritten
        perm = state_dict.get(f"{prefix}perm")
        if perm is not None and not is_permutation(perm):
            raise CheckpointError(f"{prefix}perm is not a permutation of the layer's inputs; the state is damaged")
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _check_state(self, state: torch.Tensor) -> None:
        found = json.loads(bytes(state.cpu().tolist()))
        check_layout(found)
        wanted = self.description()
        different = [
            f"{key}: {found.get(key)!r}, not {wanted[key]!r}" for key in wanted if found.get(key) != wanted[key]
        ]
        if different:
            raise CheckpointError("the state is of another layer than this one", different)

    def extra_repr(self) -> str:
        parts = [f"in_features={self.in_features}, out_features={self.out_features}, {self.b_type}"]
        parts.append(f"group_size={self.group_size}, zeros={self.zeros_kind}, bias={self.bias is not None}")
        if self.perm is not None:
            parts.append("act_order")
        if self.activation:
            parts.append(f"activation={self.activation}")
        return ", ".join(parts)


def check_layout(description: Mapping[str, Any]) -> None:
    """Raises CheckpointError unless this package reads the layout and version that weights were saved in."""
    if description.get("format") != STATE_FORMAT:
        raise CheckpointError(
            f"saved in format {description.get('format')!r}; this machete-aot reads format {STATE_FORMAT}"
        )
    layout = layout_for(scalar_type(description["b_type"]))
    found = (description.get("layout"), description.get("layout_version"))
    if found != (layout.name, layout.version):
        raise CheckpointError(
            f"weights were prepacked in layout {found[0]} version {found[1]}, and this machete-aot has "
            f"{layout.name} version {layout.version}; prepack the original checkpoint again"
        )


def is_permutation(order: torch.Tensor) -> bool:
    """Whether each number below its length occurs once, as far as it has values. Waits for the device.

    Where an order comes from outside this is asked once: the kernel that gathers by it reads wherever it says.
    """
    if order.is_meta:
        return True
    return torch.equal(order.sort().values, torch.arange(order.numel(), dtype=order.dtype, device=order.device))


def _checked_group(group_size: int | None, k: int) -> int:
    if group_size is None or group_size == -1 or group_size >= k:
        return -1
    if group_size <= 0 or group_size % BLOCK_K:
        raise UnsupportedError(f"groups of {group_size}; a group size is a multiple of {BLOCK_K}, or one for all k")
    return group_size
