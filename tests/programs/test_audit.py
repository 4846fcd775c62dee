"""Counting what compiled programs do, on texts of real compilers and on made-up ones.

tests/fixtures/programs has the training step of `narrow.Network`, written by narrow.py with jax
0.12.0.1, libtpu 0.0.50.1 and jax-cuda12-plugin 0.12.0.1.
"""

import functools
import lzma
import pathlib

import pytest

from inception_jax.programs import audit
from inception_jax.programs.audit import Audit, Operation

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "programs"
KERNELS = {"convolution", "convolution, to the input", "convolution, to the kernel"}


@functools.cache
def recorded(target: str) -> Audit:
    return audit.audit(lzma.decompress((FIXTURES / f"{target}.txt.xz").read_bytes()).decode())


# Sides of the images, kernel sizes and channels of narrow.Network's convolutions.
_LAYERS = [(16, 3, 3, 8), *((8, k, i, o) for k, i, o in [(1, 8, 8), (1, 8, 4), (3, 4, 8)])]
_LAYERS += [(8, k, i, o) for k, i, o in [(1, 8, 4), (5, 4, 8), (1, 8, 8)]]


def expected_flops(images: int) -> float:
    """Returns the operations of its convolutions, without any for the padding."""
    products = [side**2 * k**2 * i * o for side, k, i, o in _LAYERS]
    # There is no gradient to the images.
    return 2 * images * (3 * sum(products) - products[0])


@pytest.mark.parametrize(("target", "images"), [("v5e-8", 8), ("h100", 64)])
def test_the_convolutions_of_a_step_are_counted(target: str, images: int) -> None:
    found = recorded(target)
    assert found.convolutions == {"bf16": 3 * 7 - 1}
    assert found.flops == pytest.approx(expected_flops(images), rel=0.01)
    kinds = {each.kind for each in found.operations}
    assert {*KERNELS, "normalization", "pooling", "dense layer"} <= kinds
    by_kind = {
        kind: sum(each.times for each in found.operations if each.kind == kind) for kind in KERNELS
    }
    assert by_kind == {
        "convolution": 7,
        "convolution, to the input": 6,
        "convolution, to the kernel": 7,
    }


@pytest.mark.parametrize(("target", "images"), [("v5e-8", 8), ("h100", 64)])
def test_arguments_are_known_by_name_and_the_state_is_donated(target: str, images: int) -> None:
    found = recorded(target)
    assert found.arguments["batch['image']"] == f"u8[{images},16,16,3]"
    assert found.arguments["state.params['conv1']['conv']['kernel']"] == "f32[3,3,3,8]"
    assert found.donated_bytes == found.state_bytes > 10_000
    assert not found.host_transfers and not found.dynamic_shapes


def test_collectives_are_counted_with_their_bytes() -> None:
    assert recorded("h100").collectives == {}
    ((name, (count, size)),) = recorded("v5e-8").collectives.items()
    assert name == "all-reduce"
    assert (count, size) == (8, 5096)


def test_a_tpu_has_estimates_and_a_gpu_has_none() -> None:
    tpu, gpu = recorded("v5e-8"), recorded("h100")
    assert tpu.cycles is not None and tpu.cycles > 100_000
    assert gpu.cycles is None
    assert gpu.bytes > 1_000_000 and gpu.counts["fusion"] > 50


def test_a_tpu_copies_arguments_beside_other_operations() -> None:
    moves = [each for each in recorded("v5e-8").operations if each.opcode == "copy-start"]
    assert len(moves) == 196 and all(each.awaited is not None for each in moves)
    assert {each.kind for each in moves} == {"moves between memories"}
    modules = {each.module for each in moves}
    assert modules >= {"conv1", "inception_3a", "classifier", "optimizer and averages"}


def test_tables_have_everything_and_the_slowest_first() -> None:
    found = recorded("v5e-8")
    seconds = [each.times * (each.cycles or 0) / 1e9 for each in found.operations]
    tables = audit.tables(found.operations, seconds)
    assert set(tables) == {"by_kind", "by_module"}
    for rows in tables.values():
        assert [row["seconds"] for row in rows] == sorted(
            (r["seconds"] for r in rows), reverse=True
        )
        assert sum(row["seconds"] for row in rows) == pytest.approx(sum(seconds))
        assert sum(row["bytes"] for row in rows) == found.bytes
        assert sum(row["cycles"] for row in rows) == found.cycles
    modules = {row["name"] for row in tables["by_module"]}
    assert {"conv1", "inception_3a", "classifier", "metrics"} <= modules


def program(*lines: str, more: str = "") -> str:
    """Returns the text of a program with some operations after its arguments."""
    body = "\n".join(f"  {line}" for line in lines)
    return f"""\
HloModule jit_f

{more}
ENTRY %main (x: bf16[8,4,4,2]) -> f32[] {{
  %x = bf16[8,4,4,2]{{3,2,1,0}} parameter(0), metadata={{op_name="state.params['conv1']['kernel']"}}
  %k = bf16[3,3,2,6]{{3,2,1,0}} parameter(1)
  %g = bf16[8,4,4,6]{{3,2,1,0}} parameter(2)
  %m = bf16[128,2]{{1,0}} parameter(3)
  %n = bf16[128,6]{{1,0}} parameter(4)
{body}
}}
"""


def only(*lines: str, more: str = "") -> Operation:
    (operation,) = audit.audit(program(*lines, more=more)).operations
    return operation


FORWARD = 'op_name="jit(f)/jvp(Net)/conv1/conv_general_dilated"'
BACKWARD = 'op_name="jit(f)/transpose(jvp(Net))/conv1/conv_general_dilated"'
WINDOW = "window={size=3x3 pad=1_1x1_1}"


@pytest.mark.parametrize(
    ("line", "kind", "flops"),
    [
        (
            "%c = bf16[8,4,4,6]{3,2,1,0} convolution(%x, %k), "
            f"{WINDOW}, dim_labels=b01f_01io->b01f, metadata={{{FORWARD}}}",
            "convolution",
            2 * 8 * 16 * 9 * 2 * 6,
        ),
        (
            "%c = bf16[8,4,4,2]{3,2,1,0} convolution(%g, %k), "
            f"{WINDOW}, dim_labels=b01f_01oi->b01f, metadata={{{BACKWARD}}}",
            "convolution, to the input",
            2 * 8 * 16 * 9 * 2 * 6,
        ),
        (
            "%c = bf16[3,3,2,6]{3,2,1,0} convolution(%x, %g), window={size=4x4 pad=1_1x1_1}, "
            f"dim_labels=f01b_i01o->01bf, metadata={{{BACKWARD}}}",
            "convolution, to the kernel",
            2 * 8 * 16 * 9 * 2 * 6,
        ),
        (
            "%c = (bf16[3,3,2,6]{3,2,1,0}, u8[9]{0}) custom-call(%x, %g), "
            f"{WINDOW}, dim_labels=b01f_01io->b01f, "
            f'custom_call_target="__cudnn$convBackwardFilter", metadata={{{BACKWARD}}}',
            "convolution, to the kernel",
            2 * 8 * 16 * 9 * 2 * 6,
        ),
        (
            "%c = (bf16[8,4,4,2]{3,2,1,0}, u8[9]{0}) custom-call(%g, %k), "
            f"{WINDOW}, dim_labels=b01f_01io->b01f, "
            f'custom_call_target="__cudnn$convBackwardInput", metadata={{{BACKWARD}}}',
            "convolution, to the input",
            2 * 8 * 16 * 9 * 2 * 6,
        ),
        (
            "%c = bf16[2,6]{1,0} dot(%m, %n), lhs_contracting_dims={0}, "
            f"rhs_contracting_dims={{0}}, metadata={{{BACKWARD}}}",
            "convolution, to the kernel",
            2 * 128 * 2 * 6,
        ),
        (
            "%c = bf16[2,6]{1,0} dot(%m, %n), lhs_contracting_dims={0}, "
            'rhs_contracting_dims={0}, metadata={op_name="jit(f)/jvp(Net)/dense/dot_general"}',
            "dense layer",
            2 * 128 * 2 * 6,
        ),
    ],
)
def test_products_and_convolutions_have_a_kind_and_operations(
    line: str, kind: str, flops: float
) -> None:
    operation = only(line)
    assert (operation.kind, operation.flops) == (kind, flops)


def test_taps_on_padding_and_between_dilated_pixels_are_not_counted() -> None:
    pixel = "%p = bf16[8,1,1,2]{3,2,1,0} bitcast(%x)"
    wide = (
        f"%c = bf16[8,1,1,6]{{3,2,1,0}} convolution(%p, %k), {WINDOW}, dim_labels=b01f_01io->b01f"
    )
    assert only(pixel, wide).flops == 2 * 8 * 2 * 6
    # The gradient to the input of a convolution with stride 2: a quarter of the pixels are given.
    dilated = (
        "%c = bf16[8,8,8,2]{3,2,1,0} convolution(%g, %k), "
        "window={size=3x3 pad=1_2x1_2 lhs_dilate=2x2}, dim_labels=b01f_01oi->b01f"
    )
    assert only(dilated).flops == 2 * 8 * 16 * 9 * 2 * 6


@pytest.mark.parametrize(
    ("line", "kind", "module"),
    [
        ("%c = bf16[8,4,4,2]{3,2,1,0} copy(%x)", "copies and layout", "(none)"),
        ('%c = f32[] add(%x), metadata={op_name="jit(f)/augment/add"}', *["augmentation"] * 2),
        ('%c = f32[] add(%x), metadata={op_name="jit(f)/jvp(loss)/add"}', "loss", "loss"),
        (
            '%c = f32[] add(%x), metadata={op_name="jit(f)/average/add"}',
            *["optimizer and averages"] * 2,
        ),
        (
            '%c = f32[] add(%x), metadata={op_name="jit(f)/jvp(Net)/conv1/BatchNorm_0/add"}',
            "normalization",
            "conv1",
        ),
        (
            '%c = f32[] slice(%x), metadata={op_name="jit(f)/transpose(jvp(Net))/conv1/split"}',
            "concatenation",
            "conv1",
        ),
        (
            '%c = f32[] select-and-scatter(%x), metadata={op_name="jit(f)/jvp(Net)/pool/select"}',
            "pooling",
            "(none)",
        ),
        ('%c = f32[] add(%x), metadata={op_name="jit(f)/jvp(Net)/conv1/add"}', "other", "conv1"),
    ],
)
def test_other_operations_have_a_kind_and_a_module(line: str, kind: str, module: str) -> None:
    operation = only(line)
    assert (operation.kind, operation.module) == (kind, module)


def test_a_loop_counts_as_often_as_it_runs() -> None:
    body = """\
%body (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %negate = f32[4]{0} negate(%p), backend_config={"estimated_cycles":"10"}
}
"""
    config = 'backend_config={"known_trip_count":{"n":"7"}}'
    loop = f"%w = f32[4]{{0}} while(%x), condition=%body, body=%body, {config}"
    found = audit.audit(program(loop, more=body))
    # It stands for condition and body here.
    assert [each.times for each in found.operations] == [7, 7]
    assert found.cycles == 2 * 7 * 10 and found.bytes == 2 * 7 * (16 + 16)


def test_collectives_of_a_loop_count_as_often_as_it_runs() -> None:
    body = """\
%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%body (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %reduced = f32[4]{0} all-reduce(%p), to_apply=%sum
}

%condition (p: f32[4]) -> pred[] {
  %p = f32[4]{0} parameter(0)
  ROOT %goes_on = pred[] constant(true)
}
"""
    config = 'backend_config={"known_trip_count":{"n":"7"}}'
    loop = f"%w = f32[4]{{0}} while(%x), condition=%condition, body=%body, {config}"
    once = "%r = f32[4]{0} all-reduce(%w), to_apply=%sum"
    assert audit.audit(program(loop, once, more=body)).collectives == {"all-reduce": (8, 8 * 16)}


# Copies as libtpu 0.0.50.1 writes them, without their settings: of an array, and of its two halves.
TILED = "0,3,2,1:T(8,128)(2,1)"
COPY = (
    f"%s = (bf16[8,4,4,2]{{{TILED}S(1)}}, bf16[8,4,4,2]{{{TILED}}}, u32[]{{:S(2)}}) copy-start(%y)",
    "%z = f32[] add(%m)",
    f"%d = bf16[8,4,4,2]{{{TILED}S(1)}} copy-done(%s)",
)
HALF, WHOLE = "s8[16384]{0:T(1024)(128)(4,1)S(1)}", "s8[32768]{0:T(1024)(128)(4,1)}"
HALVES = (
    f"%b = {WHOLE} bitcast(%y)",
    f"%s.0 = (({WHOLE}), {HALF}, s32[]{{:S(2)}}) async-start(%b), calls=%first",
    f"%s.1 = (({WHOLE}), {HALF}, s32[]{{:S(2)}}) async-start(%b), calls=%second",
    "%z = f32[] add(%m)",
    f"%d.0 = {HALF} async-done(%s.0)",
    f"%d.1 = {HALF} async-done(%s.1)",
    f"%d = bf16[8,4,4,2]{{{TILED}S(1)}} custom-call(%d.0, %d.1), "
    'custom_call_target="ConcatBitcast"',
)
SLICES = "\n\n".join(
    f"""\
%{name} (p: s8[32768]) -> s8[16384] {{
  %p = {WHOLE} parameter(0)
  ROOT %slice = {HALF} slice(%p), slice={{[{low}:{low + 16384}]}}
}}"""
    for name, low in (("first", 0), ("second", 16384))
)
NEGATE = f"%y = bf16[8,4,4,2]{{{TILED}}} negate(%x)"
MULTIPLY = (
    f"%u = bf16[8,4,4,2]{{{TILED}S(1)}} multiply(%d, %d), "
    'metadata={op_name="jit(f)/jvp(Net)/conv1/norm/mul"}'
)


@pytest.mark.parametrize(("lines", "more"), [(COPY, ""), (HALVES, SLICES)])
def test_copies_between_memories_belong_to_their_reader_and_are_awaited(
    lines: tuple[str, ...], more: str
) -> None:
    found = audit.audit(program(NEGATE, *lines, MULTIPLY, more=more))
    moves = [each for each in found.operations if each.name.startswith("s")]
    assert {(each.kind, each.module) for each in moves} == {("moves between memories", "conv1")}
    # The 8 images are padded to 128 lanes, the 2 channels to 8 sublanes.
    assert sum(each.bytes for each in moves) == 2 * 128 * 8 * 4 * 4
    awaiting = {found.operations[each.awaited].name for each in moves if each.awaited is not None}
    assert awaiting == {"u"}


def test_a_copy_to_the_device_belongs_to_what_made_it_and_may_last_to_the_end() -> None:
    made = MULTIPLY.replace("%d", "%x").replace("%u", "%made")
    evicted = COPY[0].replace("S(1)}, bf16", "}, bf16").replace("}, u32", "S(1)}, u32")
    evicted = evicted.replace("%y", "%made")
    found = audit.audit(program(made, evicted, COPY[2].replace("S(1)", "")))
    move = found.operations[1]
    assert (move.kind, move.module) == ("moves between memories", "conv1")
    assert (move.bytes, move.awaited) == (2 * 128 * 8 * 4 * 4, 2)


@pytest.mark.parametrize(
    "line",
    [
        # Transposed on its way, and in the same memory.
        f"%c = bf16[8,4,4,2]{{{TILED.replace('0,3', '3,0')}S(1)}} copy(%y)",
        f"%c = bf16[8,4,4,2]{{{TILED}}} copy(%y)",
        f"%c = (bf16[8,4,4,2]{{{TILED}}}, bf16[8,4,4,2]{{{TILED}}}, u32[]) copy-start(%y)",
    ],
)
def test_copies_that_change_the_layout_or_stay_are_not_moves(line: str) -> None:
    _, copy = audit.audit(program(NEGATE, line)).operations
    assert copy.kind == "copies and layout"


def test_only_the_slices_that_a_fused_operation_takes_are_read() -> None:
    function = """\
%slices (p: bf16[8,4,4,2], q: bf16[8,4,4,6]) -> bf16[8,4,4,2] {
  %p = bf16[8,4,4,2]{3,2,1,0} parameter(0)
  %q = bf16[8,4,4,6]{3,2,1,0} parameter(1)
  %nested = bf16[8,4,4,2]{3,2,1,0} fusion(%q), kind=kLoop, calls=%nested
  %again = bf16[8,4,4,2]{3,2,1,0} slice(%q), slice={[0:8], [0:4], [0:4], [0:2]}
  %other = bf16[8,4,4,1]{3,2,1,0} slice(%q), slice={[0:8], [0:4], [0:4], [5:6]}
  ROOT %sum = bf16[8,4,4,2]{3,2,1,0} add(%p, %nested)
}
"""
    nested = """\
%nested (r: bf16[8,4,4,6]) -> bf16[8,4,4,2] {
  %r = bf16[8,4,4,6]{3,2,1,0} parameter(0)
  ROOT %first = bf16[8,4,4,2]{3,2,1,0} slice(%r), slice={[0:8], [0:4], [0:4], [0:2]}
}
"""
    line = "%c = bf16[8,4,4,2]{3,2,1,0} fusion(%x, %g), kind=kLoop, calls=%slices"
    # All of the first operand, 3 of 6 channels of the second, and the result.
    assert only(line, more=f"{function}\n{nested}").bytes == 2 * 8 * 4 * 4 * (2 + 3 + 2)


def test_memory_on_the_chip_is_not_counted_as_traffic() -> None:
    there = "%c = bf16[8,4,4,2]{3,2,1,0} negate(%x)"
    here = there.replace("{3,2,1,0}", "{3,2,1,0:S(1)}")
    assert only(there).bytes == 2 * only(here).bytes == 2 * 512


@pytest.mark.parametrize(
    "line",
    [
        "%c = ((f32[4]{0}), token[]) infeed(%x)",
        "%c = (f32[4]{0}, u32[], token[]) send(%x)",
        '%c = f32[4]{0} custom-call(%x), custom_call_target="xla_ffi_python_cpu_callback"',
        "%c = f32[4]{0:S(5)} copy(%x)",
    ],
)
def test_transfers_to_and_from_the_host_are_found(line: str) -> None:
    assert audit.audit(program(line)).host_transfers == ("c",)


def test_dynamic_shapes_are_found() -> None:
    """As libtpu 0.0.50.1 ends a program that sets the first dimension of its result.

    Within the program, it pads such arrays and masks the padding.
    """
    line = (
        '%c = f32[<=8,2]{0,1:T(2,128)} custom-call(%m, %n, %n), custom_call_target="SliceToDynamic"'
    )
    assert audit.audit(program(line)).dynamic_shapes == ("c",)


def test_an_all_gather_is_counted_also_when_it_is_started_and_awaited() -> None:
    lines = (
        "%s = (bf16[8,4,4,2]{3,2,1,0}, bf16[64,4,4,2]{3,2,1,0}) all-gather-start(%x)",
        "%c = bf16[64,4,4,2]{3,2,1,0} all-gather-done(%s)",
    )
    found = audit.audit(program(*lines))
    assert found.collectives == {"all-gather": (1, 512)}
    assert [each.kind for each in found.operations] == ["between devices"]
