"""Which of its arguments a Triton kernel reads and which it writes, read off the compiled kernel itself."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

NAME = r"%\w+(?:#\d+)?"
LINE = re.compile(r"^\s*(?:(%\w+)(?::(\d+))?((?:, %\w+)*) = )?\"?([a-z_]+\.[\w.]+|cf\.\w+)\"?(.*)$")
ACCESS = {"tt.load": "r", "tt.store": "w", "tt.atomic_rmw": "rw", "tt.atomic_cas": "rw"}
UNKNOWN = ("tt.call", "tt.descriptor", "tt.make_tensor", "tt.experimental", "cf.", "scf.while")


class Unreadable(ValueError):
    """The kernel does something with a pointer that is not known here."""


def find_accesses(text: str, names: Sequence[str]) -> dict[str, str]:
    """Follow each pointer from the kernel's arguments to the loads and stores that use it.

    Args:
        text: the kernel in Triton's intermediate language (TTIR).
        names: of its arguments, in order.

    Returns:
        ``"r"``, ``"w"`` or ``"rw"`` for each argument that is a pointer and used.

    Raises:
        Unreadable: the kernel has an operation that is not known here, or a load from nowhere.
    """
    header, body = _split(text)
    given = re.findall(r"(%\w+): (!tt\.ptr<|\w)", header)
    if len(given) != len(names):
        raise Unreadable(f"the kernel has {len(given)} arguments, expected {', '.join(names)}")
    flows: dict[str, set[str]] = defaultdict(set)  # a value -> the values it may point into
    uses = list(_read(body, flows))
    roots = {value: {name} for (value, kind), name in zip(given, names) if kind.startswith("!")}
    pointers = set(roots)
    found: dict[str, set[str]] = defaultdict(set)
    for value, access in uses:
        reached = _reach(value, flows) & pointers
        if not reached:
            raise Unreadable(f"{value} is loaded or stored and comes from no argument")
        for root in reached:
            found[next(iter(roots[root]))] |= set(access)
    return {name: "".join(sorted(found[name])) for name in names if name in found}


def _split(text: str) -> tuple[str, list[str]]:
    lines = text.splitlines()
    start = next(n for n, line in enumerate(lines) if "tt.func public" in line)
    header = lines[start]
    return header, lines[start + 1 :]


def _read(lines: Sequence[str], flows: dict[str, set[str]]) -> Iterator[tuple[str, str]]:
    """Note what flows into what; yield the pointers used and how."""
    regions: list[tuple[list[str], list[str]]] = []  # the results of each open loop or branch, and its own names
    for line in lines:
        stripped = line.strip()
        if stripped.startswith("tt.func"):
            raise Unreadable("the kernel calls a function that was not inlined")
        parts = LINE.match(line)
        if parts is None:
            if stripped.startswith("}") and "else" not in stripped and regions:
                regions.pop()
            continue
        first, count, others, operation, rest = parts.groups()
        if operation.startswith(UNKNOWN):
            raise Unreadable(f"{operation} is not known here")
        results = [first, *re.findall(r"%\w+", others)] if first else []
        if count:
            results = [f"{first}#{n}" for n in range(int(count))]
        operands = re.findall(NAME, rest.split(" : ")[0])
        if operation == "scf.for":
            carried = re.findall(rf"(%\w+) = ({NAME})", rest.partition("iter_args(")[2])
            for result, (own, value) in zip(results, carried):
                flows[own].add(value)
                flows[result].add(value)
            regions.append((results, [own for own, _ in carried]))
        elif operation in ("scf.if", "tt.reduce", "tt.scan") or stripped.endswith("({"):
            regions.append((results if operation == "scf.if" else [], []))
        elif operation == "scf.yield":
            results, own = regions[-1]
            for n, value in enumerate(operands):
                for target in (*results[n : n + 1], *own[n : n + 1]):
                    flows[target].add(value)
        elif operation in ACCESS:
            yield operands[0], ACCESS[operation]
        else:  # a pointer moved by an offset points where it did; of other operations any operand may be a pointer
            for result in results:
                flows[result].update(operands[:1] if operation == "tt.addptr" else operands)


def _reach(value: str, flows: dict[str, set[str]]) -> set[str]:
    seen, waiting = set(), [value]
    while waiting:
        if (current := waiting.pop()) not in seen:
            seen.add(current)
            waiting += flows.get(current, ())
    return seen
