# SPDX-License-Identifier: Apache-2.0
"""Zero points, group sizes, weight types and what becomes of the sums, on a GPU, over ragged shapes.

Expected values come from the codes, in fp64, with weights rounded once: the kernels subtract floating zeros in a fused
multiply-add. The reference rounds twice there, so it is compared on scales with which both ways agree.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from gpu_layers import DTYPES, TOLERANCE, Guarded, Layer, after, pack, same_bits

import machete_aot as machete
from machete_aot import u4, u4b8, u8, u8b128

pytestmark = pytest.mark.gpu

WEIGHTS = [(b, zeros) for b in (u4, u8) for zeros in ("none", "float", "int")] + [(u4b8, "none"), (u8b128, "none")]
GROUPS = (-1, 32, 64, 96, 128, 192, 384)
TOKENS = (1, 7, 17, 65, 200)
SHAPES = ((96, 128), (1000, 1096), (1008, 1152), (4304, 1096), (1000, 1152), (4304, 1152), (1008, 128))
OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EPILOGUES = list(itertools.product((False, True), (False, True), (False, True), (None, "swiglu"), OUT_DTYPES))
BF16, FP16 = DTYPES

weights = pytest.mark.parametrize(("b_type", "zeros"), WEIGHTS, ids=lambda x: str(x))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def options(layer: Layer, m: int, chosen: tuple[bool, bool, bool, str | None, torch.dtype]) -> dict[str, object]:
    """The arguments of ``gemm`` that say what becomes of the sums."""
    bias, channel, token, activation, out_dtype = chosen
    return {
        "bias": layer.bias() if bias else None,
        "channel_scales": layer.channel_scales() if channel else None,
        "token_scales": layer.token_scales(m) if token else None,
        "activation": activation,
        "out_dtype": out_dtype,
    }


def check(
    layer: Layer, a: torch.Tensor, sums: torch.Tensor, chosen: dict[str, object], stride: int = 0, **more: object
) -> str:
    """Runs a product twice between guards. Empty where it is good. ``sums``: a @ weights in fp64."""
    arguments = {name: value for name, value in chosen.items() if name != "out_dtype"}
    expected = after(sums, **arguments)  # type: ignore[arg-type]
    m, columns = expected.shape
    runs = [Guarded(m, columns, chosen["out_dtype"], columns + stride) for _ in range(2)]  # type: ignore[arg-type]
    for guarded in runs:
        assert layer.gemm(a, out=guarded.out, **chosen, **more) is guarded.out
        guarded.check()
    error, repeatable = layer.error(runs[0].out, expected), same_bits(runs[0].out, runs[1].out)
    return "" if error <= 1 and repeatable else f"error {error:.3f} of the tolerance, repeatable: {repeatable}"


@weights
@dtypes
def test_features(dtype: torch.dtype, b_type: machete.ScalarType, zeros: str) -> None:
    """Every kind of weights with every group size and epilogue, each over shapes in turn."""
    bad = {}
    turns = {swiglu: itertools.cycle([e for e in EPILOGUES if swiglu or e[3] is None]) for swiglu in (False, True)}
    for group in GROUPS:
        for n, k in SHAPES:
            layer = Layer(n, k, group, dtype, b_type=b_type, zeros=zeros)
            a = layer.acts(max(TOKENS))
            sums = a.double() @ layer.weights.double()
            for m in TOKENS:
                for _ in range(2):
                    epilogue = next(turns[n % 16 == 0])
                    found = check(layer, a[:m], sums[:m], options(layer, m, epilogue), stride=3 * (n % 16 != 0))
                    if found:
                        bad[(m, n, k, group, *epilogue)] = found
    assert bad == {}


@weights
@dtypes
def test_every_schedule(dtype: torch.dtype, b_type: machete.ScalarType, zeros: str) -> None:
    kind = "float" if zeros == "float" else "int" if zeros == "int" else False
    bad = {}
    for group in (32, 128):
        names = machete.supported_schedules(dtype, b_type, group, kind)
        assert names
        layers = [Layer(n, k, group, dtype, b_type=b_type, zeros=zeros) for n, k in ((208, 1096), (600, 448))]
        turn = itertools.cycle(EPILOGUES)
        for layer in layers:
            a = layer.acts(300)
            sums = a.double() @ layer.weights.double()
            for name in names:
                for m in (1, 70, 300):
                    epilogue = next(e for e in turn if e[3] is None or layer.n % 16 == 0)
                    found = check(layer, a[:m], sums[:m], options(layer, m, epilogue), schedule=name)
                    if found:
                        bad[(name, m, layer.n, group, *epilogue)] = found
    assert bad == {}


@weights
@dtypes
def test_agrees_with_the_reference(dtype: torch.dtype, b_type: machete.ScalarType, zeros: str) -> None:
    for group in (96, -1):
        layer = Layer(304, 712, group, dtype, b_type=b_type, zeros=zeros)
        if zeros == "float":  # powers of two, whose products with codes are exact: rounded once or twice is the same
            layer.scales = torch.exp2(layer.scales.float().log2().floor()).to(dtype)
            layer.zeros = (layer.scales.float() * (layer.uniform(*layer.scales.shape) * 15).floor()).to(dtype)
        a = layer.acts(2, 9)
        for epilogue in EPILOGUES[::5]:
            chosen = options(layer, 18, epilogue)
            arguments = (layer.b, b_type, layer.scales, layer.zeros, group)
            reference = machete.reference.gemm(a, *arguments, **chosen)
            found = layer.gemm(a, **chosen)
            assert found.dtype == reference.dtype and found.shape == reference.shape
            assert layer.error(found, reference.double()) <= 1, epilogue


@pytest.mark.parametrize("b_type", [u4, u8], ids=str)
@pytest.mark.parametrize("zeros", ["float", "int"])
@dtypes
def test_weights_are_rounded_once(dtype: torch.dtype, zeros: str, b_type: machete.ScalarType) -> None:
    """Not less exact than torch's product with weights that were subtracted and scaled with one rounding."""
    for group, m, n, k in ((128, 64, 2048, 4096), (32, 200, 1000, 1096), (-1, 17, 4304, 1152)):
        layer = Layer(n, k, group, dtype, b_type=b_type, zeros=zeros)
        a = layer.acts(m)
        exact = a.double() @ layer.exact

        def error(out: torch.Tensor, exact: torch.Tensor = exact) -> float:
            return float((out.double() - exact).norm() / exact.norm())

        ours, torchs = error(layer.gemm(a)), error(a @ layer.weights)
        assert ours <= 1.01 * torchs, (group, m, n, k)
        sums = layer.gemm(a, out_dtype=torch.float32)  # without the output's rounding, the weights' one is left
        unrounded = error((a.double() @ layer.weights.double()).float())
        assert error(sums) <= 1.01 * unrounded, (group, m, n, k)


@pytest.mark.parametrize("b_type", [u4, u8], ids=str)
@dtypes
def test_zeros_as_they_come(dtype: torch.dtype, b_type: machete.ScalarType) -> None:
    for zeros in ("int", "float"):
        layer = Layer(200, 1024, 64, dtype, b_type=b_type, zeros=zeros)
        a, given = layer.acts(3), layer.zeros
        assert given is not None
        expected = layer.gemm(a)
        wide = torch.full((16, 223), 77, device="cuda").to(given.dtype)
        wide[:, 5:205] = given
        views = [wide[:, 5:205], given.t().contiguous().t(), torch.cat([given, given], 1)[:, :200]]
        if zeros == "int":
            views += [given.int(), given.int().t().contiguous().t()]
        for view in views:
            assert same_bits(layer.gemm(a, b_zeros=view), expected), (zeros, view.stride())


def test_every_zero_and_code() -> None:
    """All codes with all zeros: a column for each zero, a row of the identity for each code."""
    for dtype, b_type in itertools.product(DTYPES, (u4, u8)):
        size = 1 << b_type.bits
        layer = Layer(size, 256, -1, dtype, b_type=b_type, zeros="int")
        layer.codes = (torch.arange(256, device="cuda") % size).to(torch.uint8)[:, None].expand(256, size).contiguous()
        layer.b = machete.prepack_b(pack(layer.codes, b_type.bits), b_type, dtype)
        layer.zeros = torch.arange(size, device="cuda").to(torch.uint8)[None]
        identity = torch.eye(256, device="cuda", dtype=dtype)
        wanted = (layer.codes.double() - layer.zeros.double()) * layer.scales.double()
        for out_dtype in (dtype, torch.float32):
            found = layer.gemm(identity, out_dtype=out_dtype)
            assert torch.equal(found.double(), wanted.to(dtype).double()), (dtype, b_type)


@dtypes
def test_a_biased_type_is_an_unbiased_one_with_constant_zeros(dtype: torch.dtype) -> None:
    for biased, plain in ((u4b8, u4), (u8b128, u8)):
        layer = Layer(400, 1096, 32, dtype, b_type=biased)
        a = layer.acts(33)
        expected = layer.gemm(a, out_dtype=torch.float32)
        layer.b_type, layer.zeros = plain, torch.full(layer.scales.shape, biased.bias, device="cuda", dtype=torch.uint8)
        found = layer.gemm(a, out_dtype=torch.float32)
        assert float((found - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("out_dtype", OUT_DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, "swiglu"])
def test_strides_and_alignment_of_the_output(activation: str | None, out_dtype: torch.dtype) -> None:
    layer = Layer(528, 768, 128, BF16)
    columns = 528 if activation is None else 264
    for m in (1, 9, 200):
        a, tokens = layer.acts(m), layer.token_scales(m)
        chosen = {"token_scales": tokens, "activation": activation, "out_dtype": out_dtype}
        expected = layer.gemm(a, **chosen)
        assert expected.dtype == out_dtype and expected.shape == (m, columns)
        for more, offset in ((0, 0), (8, 0), (2, 0), (1, 0), (3, 1), (0, 1), (0, 2)):
            guarded = Guarded(m, columns, out_dtype, columns + more, offset)
            assert layer.gemm(a, out=guarded.out, **chosen) is guarded.out
            guarded.check()
            assert same_bits(guarded.out, expected), (m, more, offset)


def test_plain_outputs_of_another_dtype() -> None:
    """fp32 outputs rounded to 16 bits are the 16-bit outputs."""
    for dtype in DTYPES:
        layer = Layer(1000, 1096, 64, dtype)
        for m in (1, 7, 65, 300):
            a, bias = layer.acts(m), layer.bias()
            schedule = machete.supported_schedules(dtype, u4b8)[m % 5]  # so that all are summed in one order
            single = layer.gemm(a, bias=bias, out_dtype=torch.float32, schedule=schedule)
            for out_dtype in DTYPES:
                found = layer.gemm(a, bias=bias, out_dtype=out_dtype, schedule=schedule)
                assert same_bits(found, single.to(out_dtype)), (m, out_dtype)


def test_batches_with_token_scales() -> None:
    layer = Layer(256, 512, 64, BF16)
    a, tokens = layer.acts(3, 1, 5), layer.token_scales(15)
    flat = layer.gemm(a.view(15, 512), token_scales=tokens, activation="swiglu")
    assert flat.shape == (15, 128)
    for given in (tokens, tokens.view(3, 1, 5), torch.stack([tokens, tokens], 1)[:, 0]):
        assert same_bits(layer.gemm(a, token_scales=given, activation="swiglu"), flat.view(3, 1, 5, 128))
    assert layer.gemm(a[0, 0, 0], token_scales=tokens[:1], out_dtype=torch.float32).shape == (256,)
    assert layer.gemm(layer.acts(0), token_scales=tokens[:0], activation="swiglu").shape == (0, 128)


@pytest.mark.parametrize(("b_type", "zeros"), [(u4b8, "none"), (u4, "int"), (u8, "float")], ids=str)
@dtypes
def test_gate_and_up_in_one_product(dtype: torch.dtype, b_type: machete.ScalarType, zeros: str) -> None:
    gate, up = (Layer(1200, 1096, 64, dtype, seed, b_type=b_type, zeros=zeros) for seed in (1, 2))
    fused = Layer(2400, 1096, 64, dtype, b_type=b_type, zeros=zeros)
    fused.b = machete.prepack_gate_up(pack(gate.codes, b_type.bits), pack(up.codes, b_type.bits), b_type, dtype)
    fused.scales = machete.interleave_gate_up(gate.scales, up.scales)
    if gate.zeros is not None and up.zeros is not None:
        fused.zeros = machete.interleave_gate_up(gate.zeros, up.zeros)
    gate_bias, up_bias = gate.bias(), up.bias()
    for m in TOKENS:
        a = gate.acts(m)
        expected = torch.nn.functional.silu(gate.expected(a, gate_bias)) * up.expected(a, up_bias)
        found = fused.gemm(a, bias=machete.interleave_gate_up(gate_bias, up_bias), activation="swiglu")
        assert found.shape == (m, 1200)
        assert fused.error(found, expected) <= 1, m


@pytest.mark.parametrize(("b_type", "zeros"), WEIGHTS[:6], ids=str)
@dtypes
def test_rows_do_not_depend_on_the_batch(dtype: torch.dtype, b_type: machete.ScalarType, zeros: str) -> None:
    layer = Layer(4304, 1152, 32, dtype, b_type=b_type, zeros=zeros)
    a, tokens = layer.acts(520), layer.token_scales(520)
    chosen = {"channel_scales": layer.channel_scales(), "activation": "swiglu", "batch_invariant": True}
    expected = layer.gemm(a, token_scales=tokens, **chosen)
    for m in (1, 2, 7, 16, 17, 64, 65, 128, 200, 513):
        for first in (0, 3):
            rows = slice(first, first + m)
            assert same_bits(layer.gemm(a[rows], token_scales=tokens[rows], **chosen), expected[rows]), (m, first)


def test_token_scales_of_the_kernel_before() -> None:
    """They are read after the wait, like the activations that they belong to."""
    layer = Layer(4096, 4096, 128, BF16)
    x, slow = layer.acts(16).float(), torch.randn(4096, 4096, device="cuda")

    def step(overlap: bool) -> torch.Tensor:
        out, tokens = x, torch.empty(16, device="cuda")
        for _ in range(6):
            torch.amax(out.abs(), dim=1, out=tokens)
            a = (out / tokens[:, None]).to(BF16)
            tokens.mul_(1 / 64)
            out = layer.gemm(a, token_scales=tokens, out_dtype=torch.float32, overlap=overlap)
        return out

    expected = step(False)
    assert torch.isfinite(expected).all()
    for _ in range(20):
        slow = slow @ slow
        assert same_bits(step(True), expected)


def test_a_graph_sees_new_scales() -> None:
    layer = Layer(1024, 1096, 96, FP16, b_type=u4, zeros="int")
    a, tokens, channels = layer.acts(20), layer.token_scales(20), layer.channel_scales()
    chosen = {"token_scales": tokens, "channel_scales": channels, "activation": "swiglu", "out_dtype": torch.float32}
    layer.gemm(a, **chosen)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer.gemm(a, **chosen)
    for _ in range(5):
        a.copy_(layer.acts(20))
        tokens.copy_(layer.token_scales(20))
        graph.replay()
        assert same_bits(out, layer.gemm(a, **chosen))
        expected = layer.expected(a, channel_scales=channels, token_scales=tokens, activation="swiglu")
        assert layer.error(out, expected) <= 1


def test_zeros_that_change_between_calls() -> None:
    """A launch that overlaps must not read zeros which the kernels before it have yet to write."""
    layer = Layer(8192, 4096, 128, BF16, b_type=u4, zeros="int")
    assert layer.zeros is not None
    a, first, second = layer.acts(1), layer.zeros.clone(), layer.zeros.flip(1).contiguous()
    expected = []
    for zeros in (first, second):
        layer.zeros.copy_(zeros)
        expected.append(layer.gemm(a, overlap=False))
    slow = torch.randn(4096, 4096, device="cuda")
    for i in range(40):
        slow = slow @ slow
        layer.zeros.copy_((first, second)[i % 2])
        assert all(same_bits(layer.gemm(a), expected[i % 2]) for _ in range(2)), i


def test_tolerances_are_those_of_the_record() -> None:
    from machete_aot.record import TOLERANCE as RECORD

    assert {str(dtype).split(".")[1]: limit for dtype, limit in TOLERANCE.items()} == {
        "bfloat16": RECORD["bf16"],
        "float16": RECORD["fp16"],
    }
