"""A compiled program's text read for what it copies."""

from __future__ import annotations

from planning.program_for_hardware import rearranged

TEXT = """
%loop (p: (s32[], bf16[28,64,32])) -> bf16[1,64,32] {
  %stack = bf16[28,64,32]{2,1,0} get-tuple-element(%p), index=1
  %slice.1 = bf16[1,64,32]{2,1,0} dynamic-slice(%stack, %i, %zero, %zero)
  %kernel.1 = bf16[64]{0} custom-call(%a), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
  "blocks": "{}"
}}, metadata={op_name="x"}
  %copy.1 = bf16[1,64,32]{2,1,0} copy(%slice.1)
  %copy.2 = bf16[1,64,32]{2,1,0} copy(%gradient)
  ROOT %put = bf16[28,64,32]{2,1,0} dynamic-update-slice(%stack, %copy.2, %i, %zero, %zero)
}

ENTRY %main (a: f32[28,64,32]) -> f32[28,64,32] {
  %zeros = f32[28,64,32]{2,1,0} broadcast(%zero), dimensions={}
  %copy.3 = f32[28,64,32]{2,1,0} copy(%zeros)
  %copy.4 = f32[28,64,32]{1,2,0:T(8,128)} copy(%a), metadata={op_name="%slice.1"}
  %copy.5 = f32[7,7]{1,0} copy(%b)
  %away = (f32[28,64,32]{2,1,0:S(1)}, f32[28,64,32]{2,1,0}, u32[]) copy-start(%a)
  %turned = f32[28,32,64]{2,1,0} transpose(%a), dimensions={0,2,1}
  ROOT %out = f32[28,64,32]{2,1,0} fusion(%copy.4), kind=kLoop, calls=%loop
}
"""  # noqa: E501


def test_what_is_rearranged_is_told_from_what_a_loop_over_blocks_must_do():
    found = rearranged(TEXT, {(28, 64, 32), (64, 32)})
    assert [line.split()[1] for line in found] == ["copy.4", "turned"]
    assert rearranged(TEXT, {(7, 7)}) and not rearranged(TEXT, {(9, 9)})
