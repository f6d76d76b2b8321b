"""Reads the machine code of kernels: instructions, resources, loops, and the fast path through a loop."""

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from .compiled import Compiled


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str  # "@P0", "@!UP1" or ""
    opcode: str
    operands: str
    lines: tuple[tuple[str, int], ...]  # (file, line), the innermost inlined function first

    @property
    def targets(self) -> list[str]:
        """Labels it may jump to, which "CALL" may do, too."""
        jumps = self.opcode.startswith(("BRA", "BRX", "JMP", "CALL"))
        return re.findall(r"\.L_x_\d+", self.operands) if jumps else []

    @property
    def calls(self) -> bool:
        """A subroutine."""
        return self.opcode.startswith("CALL") and not self.targets

    @property
    def falls_through(self) -> bool:
        if self.guard:
            return True
        if self.targets:
            return not self.operands.startswith("`(")  # a condition may be an operand
        return not self.opcode.startswith(("EXIT", "BRX", "RET", "BPT.TRAP"))


@dataclass(eq=False)
class Block:
    """A basic block."""

    instructions: list[Instruction] = field(default_factory=list)
    next: list["Block"] = field(default_factory=list)

    @property
    def address(self) -> int:
        return self.instructions[0].address


WARP = 32
_DETOUR = 10_000  # longer than any way: what an unwanted instruction costs (the compiler merges some into other ways)
Marker = Callable[[Instruction], bool]


def opcode(prefix: str) -> Marker:
    """Instructions whose opcode starts so, "LDG.128", whatever modifiers stand between its parts; the first part is a
    regular expression."""
    first, *rest = prefix.split(".")
    pattern = re.compile(first + "".join(rf"(\.\w+)*\.{re.escape(part)}\b" for part in rest) + r"(\.|$)")
    return lambda instruction: bool(pattern.match(instruction.opcode))


@dataclass
class Kernel:
    source: str
    arch: str
    symbol: str
    name: str  # "quantize_kernel<8>"
    labeled: list[tuple[str | None, Instruction]]  # with the label before it
    registers: int
    shared_bytes: int
    stack_bytes: int
    spilled_bytes: int
    threads: int  # of a thread block
    resident: int  # thread blocks on a multiprocessor
    ptx: str
    fused: list[tuple[str, int]]  # where PTX multiplies and adds in one: (file, line)

    @property
    def template(self) -> str:
        return self.name.partition("<")[0]

    @property
    def instructions(self) -> list[Instruction]:
        return [instruction for _, instruction in self.labeled]

    def count(self, prefix: str) -> int:
        return sum(map(opcode(prefix), self.instructions))

    @cached_property
    def blocks(self) -> list[Block]:
        """In the order of addresses."""
        blocks, by_label, ended = [], {}, True
        for label, instruction in self.labeled:
            if ended or label:
                blocks.append(Block())
            if label:
                by_label[label] = blocks[-1]
            blocks[-1].instructions.append(instruction)
            ended = bool(instruction.targets) or not instruction.falls_through
        for block, after in zip(blocks, [*blocks[1:], None], strict=True):
            last = block.instructions[-1]
            block.next = [by_label[label] for label in last.targets if label in by_label]
            if last.falls_through and after:
                block.next.append(after)
        return blocks

    @cached_property
    def order(self) -> dict[Block, int]:
        """Places of the blocks in an order in which only loops lead back (reverse postorder)."""
        finished, seen = [], {self.blocks[0]}
        stack = [(self.blocks[0], iter(self.blocks[0].next))]
        while stack:
            rest = stack[-1][1]
            following = next((target for target in rest if target not in seen), None)
            if following is None:
                finished.append(stack.pop()[0])
            else:
                seen.add(following)
                stack.append((following, iter(following.next)))
        return {block: place for place, block in enumerate(reversed(finished))}

    @cached_property
    def loops(self) -> list["Region"]:
        """Each is what leads from a header to the blocks that jump back to it."""
        before: dict[Block, list[Block]] = {block: [] for block in self.order}
        ends: dict[Block, list[Block]] = {}
        for block, place in self.order.items():
            for target in block.next:
                before[target].append(block)
                if self.order[target] <= place:
                    ends.setdefault(target, []).append(block)
        loops = []
        for header, latches in ends.items():
            inside, rest = {header}, list(latches)
            while rest:
                block = rest.pop()
                if block not in inside:
                    inside.add(block)
                    rest += before[block]
            loops.append(Region(header, latches, sorted(inside, key=self.order.__getitem__)))
        return loops

    @property
    def whole(self) -> "Region":
        ends = [block for block in self.order if block.instructions[-1].opcode.startswith("EXIT")]
        return Region(self.blocks[0], ends, list(self.order))

    def fast_path(self, need: dict[Marker, int], innermost: bool = False) -> list[Instruction] | None:
        """What a thread issues between two visits of the loop's first instruction at best, if it meets at least `need`
        instructions of each kind, and as few as it can where that is 0: the shortest such way through the loop. A loop
        inside counts once. Without such a loop it is the way through the kernel. None if there is no such way."""
        found = [(loop, path) for loop in self.loops if (path := loop.shortest(need)) is not None]
        if not found:
            return self.whole.shortest(need)
        size = {True: min, False: max}[innermost]
        return size(found, key=lambda pair: len(pair[0].inside))[1]


@dataclass
class Region:
    first: Block
    ends: list[Block]
    inside: list[Block]  # in order

    def shortest(self, need: dict[Marker, int]) -> list[Instruction] | None:
        """By dynamic programming over the blocks and over how much of `need` is met so far."""
        markers, wanted = list(need), tuple(need.values())
        place = {block: i for i, block in enumerate(self.inside)}
        start = (0,) * len(wanted)
        best: dict[Block, dict[tuple[int, ...], tuple[int, Block | None, tuple[int, ...]]]] = {
            self.first: {start: (0, None, start)}
        }
        arrived: list[tuple[int, Block, tuple[int, ...]]] = []
        for block in self.inside:
            if block not in best or any(instruction.calls for instruction in block.instructions):
                continue
            gains = tuple(sum(map(marker, block.instructions)) for marker in markers)
            detour = _DETOUR * sum(gain for gain, want in zip(gains, wanted, strict=True) if want == 0)
            for met, (length, _, _) in list(best[block].items()):
                after = tuple(min(m + g, w) for m, g, w in zip(met, gains, wanted, strict=True))
                total = length + len(block.instructions) + detour
                if block in self.ends and after == wanted:
                    arrived.append((total, block, met))
                for target in block.next:
                    if place.get(target, -1) > place[block]:
                        known = best.setdefault(target, {}).get(after)
                        if known is None or total < known[0]:
                            best[target][after] = (total, block, met)
        if not arrived:
            return None
        _, block, met = min(arrived, key=lambda entry: entry[0])
        path: list[Block] = []
        while block is not None:
            path.append(block)
            _, block, met = best[block][met]
        return [instruction for block in reversed(path) for instruction in block.instructions]


def plain_name(demangled: str) -> str:
    """Without namespaces, result and parameters."""
    depth = 0
    for i, char in enumerate(demangled):
        depth += {"<": 1, ">": -1}.get(char, 0)
        if char == "(" and depth == 0 and not demangled.startswith("(anonymous", i):
            demangled = demangled[:i]
            break
    name = re.sub(r"^void |\w+::|\(anonymous namespace\)::", "", demangled)
    return name.replace("(bool)1", "true").replace("(bool)0", "false")


def demangle(symbols: list[str]) -> list[str]:
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None:
        return symbols
    done = subprocess.run([tool], input="\n".join(symbols), text=True, capture_output=True, check=True)
    return done.stdout.splitlines()


_SECTION = re.compile(r"^\t\.section\t\.text\.(\S+?),", re.MULTILINE)
_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?\w+)\s+)?([A-Z][\w.]*)\s*(.*?) ;")
_LINE = re.compile(r'//## File "(.*?)", line (\d+)')


def _instructions(text: str) -> Iterator[tuple[str | None, Instruction]]:
    label, lines, fresh = None, (), True
    for line in text.splitlines():
        if found := _LABEL.match(line):
            label = found[1]
        elif found := _LINE.search(line):
            lines = (*(() if fresh else lines), (found[1], int(found[2])))
            fresh = False
        elif found := _INSTRUCTION.match(line):
            yield label, Instruction(int(found[1], 16), found[2] or "", found[3], found[4], lines)
            label, fresh = None, True


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


_FUSED = re.compile(r"^\s*\.loc\s+(\d+)\s+(\d+)|\b(?:fma|mad)\.[\w.]*f(?:32|64)", re.MULTILINE)


def _fused(ptx: str, files: dict[str, str]) -> Iterator[tuple[str, int]]:
    line = ("", 0)
    for found in _FUSED.finditer(ptx):
        if found[1]:
            line = (files[found[1]], int(found[2]))
        else:
            yield line


def kernels(compiled: Compiled) -> list[Kernel]:
    """All kernels of a file."""
    pieces = _SECTION.split(compiled.sass)[1:]
    symbols, texts = pieces[::2], pieces[1::2]
    said = dict(re.findall(r"Compiling entry function '(\S+)'(.*?)(?=Compiling entry|\Z)", compiled.log, re.DOTALL))
    entries = dict(re.findall(r"\.entry (\w+)(.*?^\})", compiled.ptx, re.DOTALL | re.MULTILINE))
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"(.*?)"', compiled.ptx, re.MULTILINE))
    assert said.keys() == entries.keys() == set(symbols), compiled.source
    return [
        Kernel(
            source=compiled.source.name,
            arch=compiled.arch,
            symbol=symbol,
            name=plain_name(name),
            labeled=list(_instructions(text)),
            registers=_number(r"Used (\d+) registers", said[symbol]),
            shared_bytes=_number(r"(\d+) bytes smem", said[symbol]),
            stack_bytes=_number(r"(\d+) bytes stack frame", said[symbol]),
            spilled_bytes=_number(r"(\d+) bytes spill stores", said[symbol])
            + _number(r"(\d+) bytes spill loads", said[symbol]),
            threads=_number(r"\.maxntid (\d+)", entries[symbol]),
            resident=_number(r"\.minnctapersm (\d+)", entries[symbol]),
            ptx=entries[symbol],
            fused=list(_fused(entries[symbol], files)),
        )
        for symbol, name, text in zip(symbols, demangle(symbols), texts, strict=True)
    ]
