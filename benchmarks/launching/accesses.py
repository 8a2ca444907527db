"""Which of its arguments a Triton kernel reads and which it writes, read off the compiled kernel itself."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

NAME = r"%[\w.]+(?:#\d+)?"
LINE = re.compile(r"^\s*(?:(%[\w.]+)(?::(\d+))? = )?\"?([a-z_]+\.[\w.]+)\"?(.*)$")
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
    given = re.findall(r"(%[\w.]+): (!tt\.ptr<|\w)", header)
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


class _Region:
    """An open loop or branch, or the whole kernel: its results, what a loop carries, and the names it has given."""

    def __init__(self, results: Sequence[str] = (), carried: Sequence[str] = ()):
        self.results, self.carried, self.names = results, carried, {}


class _Names:
    """A name holds within its region and may be given again in the next one."""

    def __init__(self):
        self.regions = [_Region()]
        self.count = 0

    def give(self, name: str) -> str:
        self.count += 1
        unique = f"{name}@{self.count}"
        self.regions[-1].names[name] = unique
        return unique

    def find(self, name: str) -> str:
        return next((region.names[name] for region in reversed(self.regions) if name in region.names), name)


def _read(lines: Sequence[str], flows: dict[str, set[str]]) -> Iterator[tuple[str, str]]:
    """Note what flows into what; yield the pointers used and how."""
    names = _Names()
    for line in lines:
        stripped = line.strip()
        if stripped.startswith("tt.func"):
            raise Unreadable("the kernel calls a function that was not inlined")
        parts = LINE.match(line)
        if parts is None:
            if stripped.startswith("}") and len(names.regions) > 1:
                region = names.regions.pop()
                if "else" in stripped:
                    names.regions.append(_Region(region.results))
            continue
        first, count, operation, rest = parts.groups()
        if operation.startswith(UNKNOWN):
            raise Unreadable(f"{operation} is not known here")
        operands = [names.find(name) for name in re.findall(NAME, rest.split(" : ")[0])]
        given = [f"{first}#{n}" for n in range(int(count))] if count else [first] if first else []
        results = [names.give(name) for name in given]
        if operation == "scf.for":
            carried = re.findall(rf"({NAME}) = ({NAME})", rest.partition("iter_args(")[2])
            values = [names.find(value) for _, value in carried]
            names.regions.append(_Region(results))
            names.regions[-1].carried = [names.give(own) for own, _ in carried]
            for result, own, value in zip(results, names.regions[-1].carried, values):
                flows[own].add(value)
                flows[result].add(value)
        elif stripped.endswith("{") or "({" in stripped or operation == "scf.if":
            names.regions.append(_Region(results if operation == "scf.if" else ()))
        elif operation == "scf.yield":
            region = names.regions[-1]
            for n, value in enumerate(operands):
                for target in (*region.results[n : n + 1], *region.carried[n : n + 1]):
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
