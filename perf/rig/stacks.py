"""A flame graph from the kernel's samples: perf script's text to counted stacks, counted stacks to a picture (SVG).

A frame is a function; its width is the share of samples in which it was on the stack, and what it called stands on it.
Frames side by side are sorted by name: the horizontal axis is not time.
"""

import collections
import html
import re

WIDTH, ROW, MARGIN, HEAD = 1200, 17, 10, 30
NARROWEST = 0.4
CHARACTER = 6.6

USER_COLOURS = ("#f2a154", "#ee8f3c", "#f5b878", "#e9a23b")
KERNEL_COLOURS = ("#7fb0d6", "#94bfe0", "#6ca3cc", "#a6cae6")

STYLE = """text { font: 11px monospace; fill: #222; pointer-events: none }
.head { font: bold 14px sans-serif }
rect { stroke: white; stroke-width: 0.5 }
g:hover > rect { stroke: black; stroke-width: 1.5 }"""


class Frame:
    """A function in the tree of stacks."""

    def __init__(self, name, is_kernel=False):
        self.name, self.is_kernel = name, is_kernel
        self.samples, self.callees = 0, {}

    def enter(self, name, is_kernel):
        """The callee of that name."""
        return self.callees.setdefault((name, is_kernel), Frame(name, is_kernel))

    def depth(self):
        """How many frames stand on each other."""
        return 1 + max((callee.depth() for callee in self.callees.values()), default=0)


def fold(text):
    """Counts the stacks of `perf script`: a head line, one line a frame with the innermost first, an empty line."""
    stacks = collections.Counter()
    for sample in text.split("\n\n"):
        lines = sample.strip("\n").splitlines()
        if len(lines) > 1:
            thread = re.sub(r"\s+\d+.*", "", lines[0].strip())
            stacks[(thread, *(_function(line) for line in reversed(lines[1:])))] += 1
    return stacks


def _function(line):
    """Name, and whether it is the kernel's, of a line like `ffff81b0 name+0x1c ([kernel.kallsyms])`."""
    _address, name, place = re.match(r"\s*(\w+) (.*) \((.*)\)$", line).groups()
    name = re.sub(r"\+0x[0-9a-f]+$", "", name)
    return re.sub(r"::h[0-9a-f]{16}$", "", name), place.startswith("[kernel")


def tree(stacks):
    """Counted stacks as a tree."""
    root = Frame("all")
    for (thread, *functions), count in stacks.items():
        frame = root
        frame.samples += count
        for name, is_kernel in ((thread, False), *functions):
            frame = frame.enter(name, is_kernel)
            frame.samples += count
    return root


def hottest(stacks, count):
    """The functions that were running in the most samples, with their share."""
    own = collections.Counter()
    for (_thread, *functions), samples in stacks.items():
        own[functions[-1][0]] += samples
    whole = max(1, sum(own.values()))
    return [(name, samples / whole) for name, samples in own.most_common(count)]


def svg(stacks, title):
    """The picture."""
    root = tree(stacks)
    height = HEAD + ROW * root.depth() + MARGIN
    scale = (WIDTH - 2 * MARGIN) / max(1, root.samples)
    shapes = "\n".join(_shapes(root, MARGIN, height - MARGIN - ROW, scale, root.samples))
    size = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    return (f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n'
            f"<style>{STYLE}</style>\n"
            f'<text class="head" x="{MARGIN}" y="20">{html.escape(title)}: {root.samples} samples</text>\n'
            f"{shapes}\n</svg>\n")


def _shapes(frame, left, top, scale, whole):
    width = frame.samples * scale
    if width < NARROWEST:
        return
    yield _shape(frame, left, top, width, whole)
    for _, callee in sorted(frame.callees.items()):
        yield from _shapes(callee, left, top - ROW, scale, whole)
        left += callee.samples * scale


def _shape(frame, left, top, width, whole):
    colours = KERNEL_COLOURS if frame.is_kernel else USER_COLOURS
    colour = colours[sum(frame.name.encode()) % len(colours)]
    fitting = int((width - 4) / CHARACTER)
    label = frame.name if len(frame.name) <= fitting else frame.name[:max(0, fitting - 1)] + "…"
    text = f'<text x="{left + 3:.1f}" y="{top + 12}">{html.escape(label)}</text>' if fitting > 3 else ""
    hint = html.escape(f"{frame.name}: {frame.samples} samples, {100 * frame.samples / max(1, whole):.1f} %")
    return (f'<g><title>{hint}</title><rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{ROW - 1}" '
            f'fill="{colour}"/>{text}</g>')
