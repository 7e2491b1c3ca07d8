"""Basic blocks and classes of the instructions of a kernel, from what the simulator says of each of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

_MEMORY = ["ld", "ldu", "st", "atom", "red", "prefetch", "prefetchu", "applypriority"]
_CLASSES = {
    "move": "mov cvta isspacep mapa getctarank",
    "special": "ex2 lg2 rcp rsqrt sqrt sin cos tanh",
    "convert": "cvt",
    "shared": "ldmatrix stmatrix",
    "async": "cp tensormap",
    "wgmma": "wgmma",
    "mma": "mma",
    "warp": "shfl vote match redux elect activemask movmatrix",
    "barrier": "bar barrier",
    "mbarrier": "mbarrier",
    "fence": "fence membar",
    "control": "bra brx call ret exit trap brkpt",
    "other": "nanosleep griddepcontrol setmaxnreg pmevent createpolicy",
}
_CLASS_OF = {mnemonic: name for name, mnemonics in _CLASSES.items() for mnemonic in mnemonics.split()}
CLASSES = [*_CLASSES, "integer", "float", "global", "local", "param", "generic"]


def class_of(opcode: str) -> str:
    """Of "ld.global.u32": "global"."""
    mnemonic, *parts = opcode.split(".")
    if mnemonic in ("st", "red") and "async" in parts:
        return "async"
    if mnemonic in _MEMORY:
        spaces = {part.split("::")[0] for part in parts}
        found = [space for space in ("global", "shared", "local", "param") if space in spaces]
        return found[0] if found else "param" if "const" in spaces else "generic"
    floats = ("f16", "f16x2", "bf16", "bf16x2", "f32", "f32x2", "f64")
    return _CLASS_OF.get(mnemonic, "float" if parts and parts[-1] in floats else "integer")


def by_class(opcodes: Mapping[str, int]) -> dict[str, int]:
    """Executions by class, of executions by opcode."""
    counts = Counter(dict.fromkeys(CLASSES, 0))
    for opcode, n in opcodes.items():
        counts[class_of(opcode)] += n
    return dict(counts)


@dataclass
class Instruction:
    opcode: str
    leads: bool  # starts a block
    guarded: bool
    to: str  # numbers of the instructions that a branch goes to; of a call, the function
    ptx_line: int
    positions: tuple[str, ...]  # none: no .loc of its own

    @property
    def mnemonic(self) -> str:
        return self.opcode.split(".")[0]


@dataclass
class Row:
    """A basic block, or a predicated instruction."""

    first: int  # instruction
    kind: str  # "code"; "trap": ends in one; "spin": looks again; "predicated"
    positions: tuple[str, ...]
    counts_lanes: bool = False  # executions are those with a lane to run for


@dataclass
class _Block:
    first: int
    code: list[Instruction] = field(default_factory=list)
    to: list[int] = field(default_factory=list)
    kind: str = "code"


def parse(rows: Iterable[list[str]]) -> list[Instruction]:
    """Instructions of one version of a kernel, from the fields of its lines from the opcode on."""
    out: list[Instruction] = []
    for opcode, flags, to, ptx_line, *positions in rows:
        where = out[-1].positions if positions == ["="] else tuple(positions)
        out.append(Instruction(opcode, "L" in flags, "G" in flags, to, int(ptx_line), where))
    return out


def _blocks(code: list[Instruction]) -> list[_Block]:
    blocks: list[_Block] = []
    at = []  # the block of each instruction
    for i, instruction in enumerate(code):
        if instruction.leads or not i:
            blocks.append(_Block(i))
        blocks[-1].code.append(instruction)
        at.append(len(blocks) - 1)
    for number, block in enumerate(blocks):
        last = block.code[-1]
        if last.mnemonic in ("bra", "brx"):
            block.to = [at[int(target)] for target in last.to.split()]
        falls_through = last.guarded or last.mnemonic not in ("bra", "brx", "ret", "exit", "trap")
        if falls_through and number + 1 < len(blocks):
            block.to.append(number + 1)
    return blocks


def _mark_traps(blocks: list[_Block]) -> None:
    """Blocks that can only end in a trap or a failed assertion."""

    def traps(block: _Block) -> bool:
        ends = any(not i.guarded and (i.opcode == "trap" or i.to == "__assertfail") for i in block.code)
        return ends or (bool(block.to) and all(blocks[t].kind == "trap" for t in block.to))

    changed = True
    while changed:
        changed = False
        for block in reversed(blocks):
            if block.kind != "trap" and traps(block):
                block.kind, changed = "trap", True


def _back_edges(blocks: list[_Block]) -> list[tuple[int, int]]:
    """Of a depth-first walk."""
    edges, is_open = [], dict[int, bool]()
    for root in range(len(blocks)):
        stack = [] if root in is_open else [(root, iter(blocks[root].to))]
        is_open.setdefault(root, True)
        while stack:
            block, successors = stack[-1]
            for t in successors:
                if t not in is_open:
                    is_open[t] = True
                    stack.append((t, iter(blocks[t].to)))
                    break
                if is_open[t]:
                    edges.append((block, t))
            else:
                is_open[block] = False
                stack.pop()
    return edges


_EFFECTS = {
    "st",
    "red",
    "atom",
    "cp",
    "stmatrix",
    "wgmma",
    "mma",
    "ldmatrix",
    "bar",
    "barrier",
    "mbarrier",
    "call",
    "brx",
}


def _looks(i: Instruction) -> bool:
    parts = set(i.opcode.split("."))
    return bool(
        parts & {"try_wait", "test_wait"}
        or (i.mnemonic == "atom" and "cas" in parts)
        or (i.mnemonic == "ld" and parts & {"acquire", "relaxed", "volatile"})
    )


def _mark_spins(blocks: list[_Block]) -> None:
    """Loops that look at memory or an mbarrier and change nothing: they go round only when the first look fails."""
    before: list[list[int]] = [[] for _ in blocks]
    for number, block in enumerate(blocks):
        for t in block.to:
            before[t].append(number)
    for end, head in _back_edges(blocks):
        loop, todo = {head}, [end]
        while todo:
            number = todo.pop()
            if number not in loop:
                loop.add(number)
                todo += before[number]
        code = [i for number in loop for i in blocks[number].code]
        if any(map(_looks, code)) and not any(i.mnemonic in _EFFECTS and not _looks(i) for i in code):
            for number in loop:
                if blocks[number].kind != "trap":
                    blocks[number].kind = "spin"


def rows_of(code: list[Instruction]) -> list[Row]:
    """Every basic block and predicated instruction. Where a block is: at its first instruction that has a position, or
    where what lies before it is."""
    blocks = _blocks(code)
    _mark_traps(blocks)
    _mark_spins(blocks)
    rows, before = [], ()
    for block in blocks:
        where = next((i.positions for i in block.code if i.positions), before)
        rows.append(Row(block.first, block.kind, where, counts_lanes=block.kind == "trap" and block.code[0].guarded))
        for number, i in enumerate(block.code, block.first):
            before = i.positions or before
            if i.guarded and not i.opcode.startswith("br"):
                rows.append(Row(number, "trap" if i.opcode == "trap" else "predicated", before, counts_lanes=True))
    return rows
