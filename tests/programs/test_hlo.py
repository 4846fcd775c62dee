"""Reading the text of compiled programs."""

import pytest

from inception_jax.programs import hlo

TEXT = """\
HloModule jit_f, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias), {1}: (2, {}, may-alias) }, entry_computation_layout={(f32[])->f32[]}

%body (p.1: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p.1 = (s32[], f32[4]{0:T(128)}) parameter(0)
  ROOT %tuple = (s32[], f32[4]{0:T(128)}) tuple(%p.1, %p.1)
}

%fused (param: bf16[2,3]) -> bf16[2,3] {
  %param = bf16[2,3]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %negate.1 = bf16[2,3]{1,0:T(8,128)(2,1)} negate(%param), metadata={op_name="jit(f)/neg"}
}

ENTRY %main (x: bf16[2,3], n: s32[]) -> bf16[2,3] {
  %x = bf16[2,3]{1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="batch[\\'image\\']"}
  %n = s32[]{:T(128)S(6)} parameter(1)
  %init = (s32[], f32[4]{0:T(128)S(1)}) tuple(%n, /*index=1*/%n)
  %while.2 = (s32[], f32[4]{0:T(128)}) while(%init), condition=%body, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  ROOT %fusion.3 = bf16[2,3]{1,0:T(8,128)(2,1)} fusion(%x), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"1854","x":0}
}
"""  # noqa: E501


def test_a_program_is_read_with_its_loops_fusions_and_donated_arguments() -> None:
    module = hlo.parse(TEXT)
    assert set(module.computations) == {"body", "fused", "main"}
    assert module.aliased == {0, 2}
    assert [each.op_name for each in module.parameters] == ["batch['image']", ""]
    loop, fusion = (module.entry.instructions[name] for name in ("while.2", "fusion.3"))
    assert (loop.opcode, loop.trips, loop.cycles) == ("while", 7, None)
    assert [array.shape for array in loop.arrays] == [(), (4,)]
    assert (fusion.opcode, fusion.cycles, fusion.operands) == ("fusion", 1854, ("x",))
    assert [each.name for _, each in module.inside(fusion)] == ["param", "negate.1"]
    assert module.entry.operands(fusion)[0].dtype == "bf16"


@pytest.mark.parametrize(
    ("text", "size", "padded", "memory"),
    [
        # 64 channels occupy 128 lanes.
        ("bf16[64,8,8,64]{3,0,2,1:T(8,128)(2,1)}", 524288, 1048576, hlo.DEVICE_MEMORY),
        # As do 64 images, where the layout puts those last.
        ("bf16[64,8,8,64]{0,3,2,1:T(8,128)(2,1)S(1)}", 524288, 1048576, 1),
        ("f32[10]{0:T(128)}", 40, 512, hlo.DEVICE_MEMORY),
        ("f32[3,3,16,4]{3,2,1,0}", 2304, 2304, hlo.DEVICE_MEMORY),
        ("u32[]{:T(128)S(5)}", 4, 4, hlo.HOST_MEMORY),
        ("f32[4,8]{1,0:T(4,128)}", 128, 2048, hlo.DEVICE_MEMORY),
    ],
)
def test_an_array_occupies_whole_tiles(text: str, size: int, padded: int, memory: int) -> None:
    line = f"HloModule m\n\nENTRY %e (a: f32[]) -> f32[] {{\n  ROOT %a = {text} parameter(0)\n}}\n"
    (array,) = hlo.parse(line).parameters[0].arrays
    assert (array.bytes, array.padded_bytes, array.memory) == (size, padded, memory)


def test_a_dimension_with_a_bound_is_dynamic() -> None:
    line = "HloModule m\n\nENTRY %e (a: f32[]) -> f32[] {\n  ROOT %a = f32[<=8,2] parameter(0)\n}\n"
    (array,) = hlo.parse(line).parameters[0].arrays
    assert array.is_dynamic and array.shape == (8, 2)


def test_a_text_without_an_entry_is_refused() -> None:
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse("HloModule m\n")
