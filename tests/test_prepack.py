# SPDX-License-Identifier: Apache-2.0
"""prepack_b and its inverses: round trips over any shape, padding, chunking, scratch memory, errors.

That each code lies where the kernels look for it is test_layout.py's matter.
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from machete_aot import prepack
from machete_aot.errors import ArgumentError, UnsupportedError
from machete_aot.layout import packed_shape
from machete_aot.scalar_type import SCALAR_TYPES, ScalarType, u4b8, u8b128
from quantised import gptq, random_codes

TYPES = st.sampled_from(list(SCALAR_TYPES.values()))
SEEDS = st.integers(0, 2**32 - 1)


@given(n=st.integers(1, 200), k=st.integers(1, 300), type_=TYPES, seed=SEEDS)
@settings(max_examples=60, deadline=None)
def test_round_trip(n: int, k: int, type_: ScalarType, seed: int) -> None:
    codes = random_codes(k, n, type_.bits, seed)
    packed = prepack.prepack_b(gptq(codes, type_.bits, fill=1), type_, k=k)
    assert packed.dtype == torch.int32 and packed.is_contiguous()
    assert tuple(packed.shape) == packed_shape(n, k, type_)
    np.testing.assert_array_equal(prepack.unpack_b(packed, type_, n, k).numpy(), codes)
    assert torch.equal(prepack.unpack_to_gptq(packed, type_, n, k), gptq(codes, type_.bits, fill=type_.bias))


@given(n=st.integers(1, 130), k=st.integers(1, 130), type_=TYPES)
@settings(max_examples=30, deadline=None)
def test_padding_stands_for_zero(n: int, k: int, type_: ScalarType) -> None:
    codes = random_codes(k, n, type_.bits, seed=n)
    packed = prepack.prepack_b(gptq(codes, type_.bits, fill=3), type_, k=k)
    tiles_n, tiles_k, _ = packed.shape
    everything = prepack.unpack_b(packed, type_, 64 * tiles_n, 64 * tiles_k).numpy().astype(int)
    assert not (everything[k:] - type_.bias).any()
    assert not (everything[:, n:] - type_.bias).any()


def test_k_defaults_to_every_code() -> None:
    codes = random_codes(24, 3, 4, seed=1)
    packed = prepack.prepack_b(gptq(codes, 4), u4b8)
    assert torch.equal(packed, prepack.prepack_b(gptq(codes, 4), u4b8, k=24))


@given(
    n=st.integers(1, 400),
    k=st.integers(1, 200),
    type_=TYPES,
    chunk=st.sampled_from([1, 64 * 64, 3 * 64 * 128, 1 << 30]),
)
@settings(max_examples=30, deadline=None)
def test_chunking_changes_nothing(n: int, k: int, type_: ScalarType, chunk: int) -> None:
    codes = random_codes(k, n, type_.bits, seed=k)
    w_q = gptq(codes, type_.bits, fill=type_.bias)
    whole = prepack.prepack_b(w_q, type_, k=k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepack, "CHUNK_BYTES", chunk)
        packed = prepack.prepack_b(w_q, type_, k=k)
        unpacked = prepack.unpack_b(packed, type_, n, k)
        again = prepack.unpack_to_gptq(packed, type_, n, k)
    assert torch.equal(packed, whole)
    np.testing.assert_array_equal(unpacked.numpy(), codes)
    assert torch.equal(again, w_q)


@pytest.mark.parametrize("type_", [u4b8, u8b128], ids=str)
def test_strides_do_not_matter(type_: ScalarType) -> None:
    w_q = gptq(random_codes(96, 150, type_.bits, seed=2), type_.bits)
    expected = prepack.prepack_b(w_q, type_)
    assert torch.equal(prepack.prepack_b(w_q.t().contiguous().t(), type_), expected)
    wide = torch.zeros(2 * w_q.shape[0], 300, dtype=torch.int32)
    wide[::2, ::2] = w_q
    assert torch.equal(prepack.prepack_b(wide[::2, ::2], type_), expected)
    apart = torch.zeros(*expected.shape[:2], 2 * expected.shape[2], dtype=torch.int32)
    apart[..., ::2] = expected
    assert torch.equal(prepack.unpack_to_gptq(apart[..., ::2], type_, 150, 96), w_q)


def test_both_activation_dtypes_share_the_layout() -> None:
    w_q = gptq(random_codes(64, 64, 4, seed=3), 4)
    assert torch.equal(prepack.prepack_b(w_q, u4b8, torch.float16), prepack.prepack_b(w_q, u4b8, torch.bfloat16))


W_Q = torch.zeros(8, 16, dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((W_Q, u4b8, torch.float32), "a_dtype must be torch.bfloat16 or torch.float16, got torch.float32"),
        ((W_Q, u4b8, torch.int8), "a_dtype"),
        ((W_Q.to(torch.uint8), u4b8), r"w_q must be int32, GPTQ-packed weights \[ceil\(K / 8\), N\]; got torch.uint8"),
        ((W_Q.to(torch.int64), u4b8), "int32.*got torch.int64"),
        ((W_Q[0], u4b8), r"got shape \(16,\)"),
        ((W_Q[None], u4b8), r"got shape \(1, 8, 16\)"),
        ((W_Q[:0], u4b8), r"got shape \(0, 16\)"),
        ((W_Q[:, :0], u4b8), r"got shape \(8, 0\)"),
        ((W_Q.numpy(), u4b8), "must be a torch.Tensor, got ndarray"),
    ],
)
def test_wrong_weights(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        prepack.prepack_b(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(("k", "fits"), [(56, False), (57, True), (64, True), (65, False), (0, False), (-1, False)])
def test_k_must_end_in_the_last_row(k: int, fits: bool) -> None:
    if fits:
        assert prepack.prepack_b(W_Q, u4b8, k=k).shape == (1, 1, 512)
    else:
        with pytest.raises(ArgumentError, match="8 rows of 8 codes hold K = 57 to 64"):
            prepack.prepack_b(W_Q, u4b8, k=k)


def test_a_type_without_a_layout() -> None:
    with pytest.raises(UnsupportedError, match="16-bit type u16"):
        prepack.prepack_b(W_Q, ScalarType("u16", 16, 0))


def test_unpacking_something_else() -> None:
    packed = prepack.prepack_b(W_Q, u4b8)
    for unpack in (prepack.unpack_b, prepack.unpack_to_gptq):
        with pytest.raises(ArgumentError, match=r"prepacked as \(2, 1, 512\), got shape \(1, 1, 512\)"):
            unpack(packed, u4b8, 65, 64)
        with pytest.raises(ArgumentError, match=r"prepacked as \(1, 1, 1024\), got shape"):
            unpack(packed, u8b128, 64, 64)
        with pytest.raises(ArgumentError, match="must be int32"):
            unpack(packed.float(), u4b8, 64, 64)
        with pytest.raises(ArgumentError, match="got shape"):
            unpack(W_Q, u4b8, 16, 64)


# Scratch of the largest weight of a 70B model's layers, by what the operating system counts of this program alone:
# getrusage's maximum would begin with that of the process which started it. The second run, in one chunk, shows that
# the measurement sees what is allocated.
MEASURE = """
import re, sys, torch
from machete_aot import prepack
from machete_aot.scalar_type import u4b8
torch.set_num_threads(2)
prepack.unpack_b(prepack.prepack_b(torch.zeros(8, 64, dtype=torch.int32), u4b8), u4b8, 64, 64)
w_q = torch.ones(8192 // 8, 57344, dtype=torch.int32)
if len(sys.argv) > 1:
    prepack.CHUNK_BYTES = int(sys.argv[1])
def resident(name):
    with open("/proc/self/status") as f:
        return int(re.search(name + r":\\s+(\\d+) kB", f.read())[1]) * 1024
before = resident("VmRSS")
packed = prepack.prepack_b(w_q, u4b8)
print(resident("VmHWM") - before - packed.nbytes)
"""


def scratch_bytes(*arguments: str) -> int:
    result = subprocess.run([sys.executable, "-c", MEASURE, *arguments], check=True, capture_output=True, text=True)
    return int(result.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_scratch_is_bounded() -> None:
    assert scratch_bytes() < 100 << 20
    assert scratch_bytes(str(1 << 40)) > 400 << 20


@pytest.mark.gpu
@pytest.mark.parametrize("type_", SCALAR_TYPES.values(), ids=str)
def test_cuda_gives_the_same_bytes(type_: ScalarType) -> None:
    w_q = gptq(random_codes(333, 777, type_.bits, seed=4), type_.bits, fill=type_.bias)
    packed = prepack.prepack_b(w_q.cuda(), type_, k=333)
    assert packed.is_cuda and torch.equal(packed.cpu(), prepack.prepack_b(w_q, type_, k=333))
    assert torch.equal(prepack.unpack_to_gptq(packed, type_, 777, 333).cpu(), w_q)


@pytest.mark.gpu
@pytest.mark.parametrize("type_", [u4b8, u8b128], ids=str)
def test_scratch_on_the_gpu_is_bounded(type_: ScalarType) -> None:
    w_q = torch.ones(8192 // type_.per_int32, 57344, dtype=torch.int32, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    packed = prepack.prepack_b(w_q, type_)
    assert torch.cuda.max_memory_allocated() - before - packed.nbytes < 100 << 20
