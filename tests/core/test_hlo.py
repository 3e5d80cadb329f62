"""Reading collectives: a program written by hand whose every number was counted by hand."""

from __future__ import annotations

import pytest

from lmx.core import hlo

PROGRAM = """
HloModule jit_step, is_scheduled=true, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%piece (p: bf16[1,16]) -> bf16[8,16] {
  %p = bf16[1,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.9 = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=5, replica_groups=[1,8]<=[8], dimensions={0}
}

%other (q: bf16[1,16]) -> bf16[8,16] {
  %q = bf16[1,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.8 = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} all-gather(%q), channel_id=5, replica_groups=[1,8]<=[8], dimensions={0}
}

%inner_condition (state.1: (s32[], f32[4])) -> pred[] {
  %state.1 = (s32[], f32[4]) parameter(0)
  %five = s32[] constant(5)
  %at.1 = s32[] get-tuple-element(%state.1), index=0
  ROOT %less.1 = pred[] compare(%at.1, %five), direction=LT
}

%inner (state.2: (s32[], f32[4])) -> (s32[], f32[4]) {
  %state.2 = (s32[], f32[4]) parameter(0)
  %one = s32[] constant(2)
  %at.2 = s32[] get-tuple-element(%state.2), index=0
  %value.2 = f32[4]{0} get-tuple-element(%state.2), index=1
  %next.2 = s32[] add(%at.2, %one)
  %moved.2 = f32[4]{0} collective-permute(%value.2), channel_id=7, source_target_pairs={{0,1},{1,0}}
  ROOT %again.2 = (s32[], f32[4]) tuple(%next.2, %moved.2)
}

%outer_condition (state.3: (s32[], f32[4], bf16[1,16])) -> pred[] {
  %state.3 = (s32[], f32[4], bf16[1,16]) parameter(0)
  %flag = pred[] custom-call(%state.3), custom_call_target="unknown"
}

%outer (state.4: (s32[], f32[4], bf16[1,16])) -> (s32[], f32[4], bf16[1,16]) {
  %state.4 = (s32[], f32[4], bf16[1,16]) parameter(0)
  %at.4 = s32[] get-tuple-element(%state.4), index=0
  %value.4 = f32[4]{0} get-tuple-element(%state.4), index=1
  %small.4 = bf16[1,16]{1,0} get-tuple-element(%state.4), index=2
  %zero.4 = s32[] constant(1)
  %copied.4 = s32[] copy(%zero.4)
  %begin.4 = (s32[], f32[4]) tuple(%copied.4, %value.4)
  %first.4 = bf16[8,16]{1,0} fusion(%small.4), kind=kCustom, calls=%piece
  %second.4 = bf16[8,16]{1,0} fusion(%small.4), kind=kCustom, calls=%other
  %loop.4 = (s32[], /*index=1*/f32[4]) while(%begin.4), condition=%inner_condition, body=%inner
  %out.4 = f32[4]{0} get-tuple-element(%loop.4), index=1
  ROOT %again.4 = (s32[], f32[4], bf16[1,16]) tuple(%at.4, %out.4, %small.4)
}

%wrapped (p.5: f32[32]) -> f32[4] {
  %p.5 = f32[32]{0} parameter(0)
  ROOT %scatter.5 = f32[4]{0} reduce-scatter(%p.5), channel_id=9, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, to_apply=%add
}

%all-reduce-scatter.6.clone.1 (p.6: f32[32,8]) -> f32[4,8] {
  %p.6 = f32[32,8]{1,0:T(8,128)} parameter(0)
  %sum.6 = f32[32,8]{1,0:T(8,128)} all-reduce(%p.6), channel_id=10, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add.clone
  %id.6 = u32[] partition-id()
  %four.6 = u32[] constant(4)
  %begin.6 = u32[]{:T(128)} multiply(%id.6, %four.6)
  %zero.6 = u32[] constant(0)
  ROOT %slice.6 = f32[4,8]{1,0:T(8,128)} dynamic-slice(%sum.6, %begin.6, %zero.6), dynamic_slice_sizes={4,8}
}

ENTRY %main (a: f32[32], b: bf16[1,16]) -> f32[4] {
  %a = f32[32]{0} parameter(0)
  %b = bf16[1,16]{1,0} parameter(1)
  %wide = f32[32,8]{1,0:T(8,128)} broadcast(%a), dimensions={0}
  %part = f32[4,8]{1,0:T(8,128)} fusion(%wide), kind=kCustom, calls=%all-reduce-scatter.6.clone.1
  %start = ((f32[32]{0}), f32[4]{0}, s32[]) async-start(%a), calls=%wrapped
  %scattered = f32[4]{0} async-done(%start), calls=%wrapped
  %gather = (f32[4]{0}, f32[8]{0}) all-gather-start(%scattered), channel_id=1, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
  %gathered = f32[8]{0} all-gather-done(%gather)
  %pair = (f32[32]{0:T(256)}, bf16[6,2]{1,0}) all-reduce(%a, %b), channel_id=2, replica_groups=mesh['x'=2,'y'=4] {'y'}, to_apply=%add
  %zero = s32[] constant(0)
  %begin = (s32[], f32[4], bf16[1,16]) tuple(%zero, %scattered, %b)
  %known = (s32[], f32[4], bf16[1,16]) while(%begin), condition=%outer_condition, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
  %unknown = (s32[], f32[4], bf16[1,16]) while(%known), condition=%outer_condition, body=%outer
  ROOT %result = f32[4]{0} get-tuple-element(%unknown), index=1
}
"""  # noqa: E501
GATHER = dict(kind="all-gather", bytes=8 * 16 * 2, group=tuple(range(8)))  # the piece: two fusions, one channel
PERMUTE = dict(kind="collective-permute", bytes=16, group=(0, 1))  # counter 1, 3: two trips of the inner loop


def one(count: int, counted: bool = True, **about) -> hlo.Collective:
    return hlo.Collective(count=count, counted=counted, **about)


def test_a_program_counted_by_hand():
    assert hlo.collectives(PROGRAM) == [
        one(1, kind="reduce-scatter", bytes=32 * 8 * 4, group=tuple(range(8))),  # a fusion
        one(1, kind="reduce-scatter", bytes=32 * 4, group=tuple(range(8))),
        one(1, kind="all-gather", bytes=8 * 4, group=(0, 4)),
        one(1, kind="all-reduce", bytes=32 * 4 + 12 * 2, group=(0, 1, 2, 3)),
        one(3, **GATHER),
        one(3 * 2, **PERMUTE),
        one(1, counted=False, **GATHER),
        one(2, counted=False, **PERMUTE),
    ]


def test_attributes_of_several_lines_end_no_computation():
    """A Pallas kernel's metadata has them, and what stands after it counts like all else."""
    kernel = '  %kernel.4 = f32[4]{0} custom-call(%value.4), custom_call_target="kernel", frontend_attributes={\n'
    kernel += '"kernel_metadata":"{\n  \\"block\\": 512\n}"\n}}, metadata={op_name="kernel"}\n'
    place = "  %first.4 = "
    assert PROGRAM.count(place) == 1
    assert hlo.collectives(PROGRAM.replace(place, kernel + place)) == hlo.collectives(PROGRAM)


@pytest.mark.parametrize(
    "unreadable",
    [
        ("%copied.4 = s32[] copy(%zero.4)", "%copied.4 = s32[] negate(%at.4)"),  # where the inner loop begins
        ("%one = s32[] constant(2)", "%one = s32[] negate(%at.2)"),  # its step
        ("%one = s32[] constant(2)", "%one = s32[] constant(0)"),
        ("%next.2 = s32[] add(", "%next.2 = s32[] multiply("),
    ],
)
def test_a_loop_whose_start_or_step_cannot_be_read_is_counted_once_and_says_so(unreadable):
    assert unreadable[0] in PROGRAM
    found = hlo.collectives(PROGRAM.replace(*unreadable))
    moved = [each for each in found if each.kind == "collective-permute"]
    assert moved == [one(3, counted=False, **PERMUTE), one(1, counted=False, **PERMUTE)]  # the outer loop is read still
    assert [each.counted for each in found if each.kind == "all-gather"] == [True, True, False]


@pytest.mark.parametrize(
    ("kind", "sent"),
    [("all-gather", 75), ("reduce-scatter", 75), ("all-reduce", 150), ("all-to-all", 75), ("collective-permute", 100)],
)
def test_what_a_ring_sends(kind, sent):
    assert hlo.Collective(kind, 1, 100, (0, 1, 2, 3)).wire == sent


@pytest.mark.parametrize(
    ("written", "first"),
    [
        ("{{0,2},{1,3}}", (0, 2)),
        ("[2,4]<=[8]", (0, 1, 2, 3)),
        ("[4,2]<=[2,2,2]T(0,2,1)", (0, 2)),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", (0, 1, 4, 5)),
        ("mesh['a'=2,'b'=4], device_ids=([2,2,2]T(2,1,0)) {'b'}", (0, 4, 2, 6)),
        ("mesh['a'=8] {'a':(2)2}", (0, 2)),
        ("{}", (0, 1, 2, 3, 4, 5, 6, 7)),
    ],
)
def test_groups_in_every_notation(written, first):
    line = f"ENTRY %main (a: f32[4]) -> f32[4] {{\n  %r = f32[4]{{0}} all-reduce(%a), replica_groups={written}, x=1\n}}"
    (found,) = hlo.collectives(f"HloModule m, num_partitions=8\n{line}\n")
    assert found.group == first


@pytest.mark.parametrize(
    ("shape", "size"), [("f32[]", 4), ("bf16[2,3]{1,0:T(8,128)(2,1)S(1)}", 12), ("(s8[4], (u4[6]{0}, f8e4m3fn[2]))", 9)]
)
def test_bytes_of_shapes(shape, size):
    assert hlo.nbytes(shape) == size
