"""Compile kernels ahead of time for a GPU that this machine lacks, and count the instructions of their machine code.

`compile_for` needs no device, since the target is an argument.  Triton's wheel contains NVIDIA's disassembler, so
registers, spills and the instructions of every loop can be read from the SASS:

    compiled = compile_for(kernel, {"x_ptr": "*fp32", "count": "i32"}, {"BLOCK": 64}, "sm_90", num_warps=8)
    for loop in loops(compiled.sass): print(loop.depth, loop.own)
    instructions_per_pair(compiled, trips=[16, 256], pairs_per_thread=64 * 256)

A loop is a natural loop of the control flow graph: a branch back to an instruction that dominates it, with every
instruction that can reach the branch without passing that one again.  Both sides of a condition count in full, so a
count is the most that one thread can issue.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from revq_kernels.triton.launches import Launch

TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942", "gfx950")

POINTEES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
}

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """One kernel for one target; counts that the target's tools do not report are None."""

    target: str
    registers: int | None
    """Vector registers of one thread."""
    stack: int | None
    """Bytes of local (private) memory of one thread: 0 if no register was spilled."""
    shared: int
    """Bytes of shared memory of one program."""
    asm: Mapping[str, Any]
    """The output of every compiler stage: ttir, ttgir, llir, then ptx and cubin, or amdgcn and hsaco."""

    @cached_property
    def sass(self) -> str:
        """NVIDIA: the disassembly by cuobjdump, which takes a second or more; empty for AMD."""
        return _cuobjdump("-sass", self.asm["cubin"]) if "cubin" in self.asm else ""

    @property
    def spills(self) -> int | None:
        """NVIDIA: instructions that access local memory; AMD: registers that were spilled."""
        if "cubin" in self.asm:
            return sum(opcode.startswith(("LDL", "STL")) for _, opcode, _ in instructions(self.sass))
        return _notes(self.asm["amdgcn"]).get("vgpr_spill_count")


class Loop(NamedTuple):
    """A loop of the machine code; `loops` sorts them by their first address, outer before inner."""

    start: int
    end: int
    depth: int
    body: int
    """Instructions in the loop and in loops inside it, each counted once, without NOP."""
    own: int
    """Instructions in the loop but in no loop inside it."""


def gpu_target(target: str) -> GPUTarget:
    """Triton's description of ``sm_90``, ``gfx942``, ..."""
    if target.startswith("sm_"):
        return GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    return GPUTarget("hip", target, 64)


def compile_for(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    target: str,
    *,
    num_warps: int,
    num_stages: int = 1,
    fp_fusion: bool = True,
    divisible: Iterable[str] = (),
) -> Compiled:
    """Compile a ``@triton.jit`` function for ``target`` (one of `TARGETS`); no device is needed.

    ``signature`` gives the type of each run time argument (``"*fp32"``, ``"i64"``, ...), ``constexprs`` the value of
    all others, including integer arguments that a launch would specialize because they are 1.  ``divisible`` names the
    arguments that are multiples of 16, which a launch would detect.

    Raises:
        ValueError: if an argument has neither a type nor a value.
    """
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    missing = [name for name, kind in types.items() if kind == "constexpr" and name not in constexprs]
    if missing:
        raise ValueError(f"neither signature nor constexprs has {', '.join(missing)}")
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    values = {(kernel.arg_names.index(name),): value for name, value in constexprs.items()}
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": fp_fusion}
    compiled = triton.compile(ASTSource(kernel, types, values, attributes), gpu_target(target), options)
    shared = compiled.metadata.shared
    if target.startswith("sm_"):
        usage = _cuobjdump("--dump-resource-usage", compiled.asm["cubin"])
        counts = {name: int(count) for name, count in re.findall(r"\b(REG|STACK):(\d+)", usage)}
        return Compiled(target, counts["REG"], counts["STACK"], shared, compiled.asm)
    notes = _notes(compiled.asm["amdgcn"])
    return Compiled(target, notes.get("vgpr_count"), notes.get("private_segment_fixed_size"), shared, compiled.asm)


def compile_launch(launch: Launch, target: str) -> Compiled:
    """Compile what a launch would compile on ``target``, given the types and values of its arguments.

    As in a launch, an integer 1 becomes a constant and multiples of 16 are marked as divisible, unless the kernel has
    the argument in ``do_not_specialize``.  Tensors may be on any device, including meta, and count as 16-byte aligned.
    """
    kernel = launch.kernel
    signature: dict[str, str] = {}
    constants, divisible = dict(launch.constants), []
    for parameter, value in zip(kernel.params, launch.arguments, strict=False):
        if isinstance(value, Tensor):
            signature[parameter.name] = "*" + POINTEES[value.dtype]
            divisible.append(parameter.name)
        elif value == 1 and not parameter.do_not_specialize:
            constants[parameter.name] = 1
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                divisible.append(parameter.name)
    return compile_for(
        kernel,
        signature,
        constants,
        target,
        num_warps=launch.num_warps,
        fp_fusion=launch.fp_fusion,
        divisible=divisible,
    )


def _cuobjdump(what: str, cubin: bytes) -> str:
    # cuobjdump finds nvdisasm through PATH
    environment = {**os.environ, "PATH": f"{TOOLS}{os.pathsep}{os.environ.get('PATH', '')}"}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), what, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


def _notes(amdgcn: str) -> dict[str, int]:
    return {name: int(n) for name, n in re.findall(r"\.(\w+):\s+(\d+)", amdgcn)}


def instructions(sass: str) -> list[tuple[int, str, str]]:
    """(address, opcode, text including the predicate) of every instruction in a SASS listing."""
    found = []
    for address, text in re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE):
        words = text.split()
        opcode = words[1] if words[0].startswith("@") else words[0]
        found.append((int(address, 16), opcode, text))
    return found


def _blocks(code: list[tuple[int, str, str]]) -> tuple[list[range], list[list[int]]]:
    """(basic blocks as ranges of instruction numbers, the successors of each block)."""
    number = {address: i for i, (address, _, _) in enumerate(code)}
    jump: dict[int, int] = {}
    ends = set()
    for i, (_, opcode, text) in enumerate(code):
        target = re.search(r"(?:`\(.*?\)|\b(0x[0-9a-f]+))\s*$", text)
        # ptxas sometimes leaves a loop by a conditional call that never returns: treat it as a jump
        jumps = opcode.startswith("BRA") or (opcode.startswith("CALL") and text.startswith("@"))
        if jumps and target and target.group(1):
            jump[i] = number[int(target.group(1), 16)]
        if jumps or opcode.startswith(("EXIT", "RET", "BRX", "JMP", "BREAK", "BSYNC", "KILL")):
            ends.add(i)
    starts = sorted({0} | set(jump.values()) | {i + 1 for i in ends if i + 1 < len(code)})
    blocks = [range(a, b) for a, b in zip(starts, [*starts[1:], len(code)], strict=True)]
    block_of = {block.start: i for i, block in enumerate(blocks)}
    following = []
    for i, block in enumerate(blocks):
        last = block[-1]
        _, opcode, text = code[last]
        after = [block_of[jump[last]]] if last in jump else []
        # a predicate after the opcode makes a branch conditional as well (BRA P0, 0x10; BRA.DIV, BRA.U)
        plain = re.fullmatch(r"(BRA|EXIT|RET\S*|BRX|JMP|KILL)(\s+0x[0-9a-f]+|\s+R\d+.*)?\s*", text)
        if not plain and i + 1 < len(blocks):
            after.append(i + 1)
        following.append(after)
    return blocks, following


def loops(sass: str) -> list[Loop]:
    """Every loop of the first kernel in a SASS listing."""
    code = instructions(sass)
    blocks, following = _blocks(code)
    before: list[list[int]] = [[] for _ in blocks]
    for i, after in enumerate(following):
        for j in after:
            before[j].append(i)
    everything = set(range(len(blocks)))
    dominators = [{0}] + [set(everything) for _ in blocks[1:]]
    changed = True
    while changed:
        changed = False
        for i in range(1, len(blocks)):
            paths = [dominators[j] for j in before[i]]
            new = (set.intersection(*paths) if paths else set()) | {i}
            changed |= new != dominators[i]
            dominators[i] = new
    members: list[tuple[int, set[int]]] = []
    for i, after in enumerate(following):
        for head in after:
            if head in dominators[i] and not (
                head == i and len(blocks[i]) == 1
            ):  # not the padding after EXIT, which branches to itself
                found, todo = {head}, [i]
                while todo:
                    block = todo.pop()
                    if block not in found:
                        found.add(block)
                        todo += before[block]
                # two back edges to one head belong to one loop, unless the loops nest
                for k, (other_head, other) in enumerate(members):
                    if other_head == head and not (found < other or other < found):
                        members[k] = (head, found | other)
                        break
                else:
                    members.append((head, found))
    size = [sum(not code[i][1].startswith("NOP") for i in block) for block in blocks]
    result = []
    for head, own in sorted(members, key=lambda item: (code[blocks[item[0]].start][0], -len(item[1]))):
        inside = set().union(*(other for _, other in members if other < own))
        depth = sum(own < other for _, other in members)
        end = max(code[blocks[b][-1]][0] for b in own)
        counts = (sum(size[b] for b in own), sum(size[b] for b in own - inside))
        result.append(Loop(code[blocks[head].start][0], end, depth, *counts))
    return result


def instructions_per_pair(compiled: Compiled, trips: Sequence[int], pairs_per_thread: int) -> float:
    """Instructions in loops that one thread issues, divided by the (query, code) pairs of that thread.

    ``trips`` says for every loop of `loops`, in that order, how often its body runs in total while the thread computes
    ``pairs_per_thread`` pairs.

    Raises:
        ValueError: if ``trips`` has another length than there are loops.
    """
    found = loops(compiled.sass)
    if len(trips) != len(found):
        raise ValueError(f"{len(found)} loops were found and {len(trips)} trip counts given: {found}")
    return sum(loop.own * n for loop, n in zip(found, trips, strict=True)) / pairs_per_thread
