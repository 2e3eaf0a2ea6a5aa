"""Copies entries of many buffers by one launch, in Triton: as SGLang's kernel, for where that does
not load."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Programs of a launch: enough to fill the link, and few beside a decode step.
PROGRAMS = 32
# Words of an entry that a program copies at a time.
BLOCK = 256
WORD = 8


# Else there is a variant for each kind of number of entries, and of where their places begin in
# memory, compiled as it comes while requests are served. `words` and the buffers are a model's.
@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["entries"],
    do_not_specialize_on_alignment=["source_places", "target_places"],
)
def _copy(  # type: ignore[no-untyped-def]  # noqa: ANN202
    sources,  # noqa: ANN001
    targets,  # noqa: ANN001
    source_places,  # noqa: ANN001
    target_places,  # noqa: ANN001
    entries,  # noqa: ANN001
    buffers,  # noqa: ANN001
    words,  # noqa: ANN001
    BLOCK: tl.constexpr,
):
    """An item is an entry of a buffer; programs take them in turn."""
    offsets = tl.arange(0, BLOCK)
    for item in range(tl.program_id(0), entries * buffers, tl.num_programs(0)):
        buffer = item // entries
        entry = item % entries
        source = tl.load(sources + buffer).to(tl.pointer_type(tl.int64))
        target = tl.load(targets + buffer).to(tl.pointer_type(tl.int64))
        source += tl.load(source_places + entry) * words
        target += tl.load(target_places + entry) * words
        for at in range(0, words, BLOCK):
            inside = at + offsets < words
            tl.store(
                target + at + offsets, tl.load(source + at + offsets, mask=inside), mask=inside
            )


def copy_entries(
    sources: torch.Tensor,
    targets: torch.Tensor,
    source_places: torch.Tensor,
    target_places: torch.Tensor,
    size: int,
    buffers: int,
) -> None:
    """As `entry_kernels.Launch`."""
    entries = len(source_places)
    if entries:
        _copy[(min(PROGRAMS, entries * buffers),)](
            sources.view(torch.int64),
            targets.view(torch.int64),
            source_places,
            target_places,
            entries,
            buffers,
            size // WORD,
            BLOCK=BLOCK,
        )
