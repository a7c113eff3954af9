"""What ptxas may do and PTX does not show: a product and a sum without rounding modifiers become one fma, or not."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

_PRODUCT = re.compile(r"^\s*mul\.(f32|f64)\s+(%\w+), ([^,]+), ([^;]+);")
_SUM = re.compile(r"^\s*(add|sub)\.(f32|f64)\s+(%\w+), ([^,]+), ([^;]+);")
_BLOCK_ENDS = re.compile(r"^\s*(\$?\w+:|\{|\}|@?%?\w*\s*bra)")
_WRITES = re.compile(r"^\s*(?:@!?%\w+\s+)?[a-z][\w.:]*\s+(?:\{([^}]*)\}|(%\w+))")
_SCRATCH = {"f32": "%r{}", "f64": "%rd{}"}


@dataclass(frozen=True)
class _Product:
    width: str
    left: str
    right: str


@dataclass(frozen=True)
class _Sum:
    op: str
    width: str
    to: str
    left: str
    right: str


def contract(ptx: str, seed: int, share: float = 0.5) -> str:
    """The PTX in which each sum of a product is one ``fma`` with probability ``share``, drawn from the seed.

    A product and its sum are in one basic block, with operands that do not change between. Results may depend on it by
    rounding; decisions must not. The product stays, for others may read it.
    """
    choose = random.Random(seed)
    free = 1 + max((int(number) for number in re.findall(r"%rd?(\d+)", ptx)), default=0)
    lines: list[str] = []
    products: dict[str, _Product] = {}
    for line in ptx.split("\n"):
        if _BLOCK_ENDS.match(line):
            products = {}
        found = _SUM.match(line)
        if found:
            total = _Sum(*(part.strip() for part in found.groups()))
            sides = [s for s in (total.left, total.right) if s in products and products[s].width == total.width]
            if sides and choose.random() < share:
                line = _fused(total, choose.choice(sides), products, _SCRATCH[total.width].format(free))
                free += 1
        lines.append(line)
        products = _after(line, products)
    return re.sub(r"(%rd?)<\d+>", rf"\1<{free}>", "\n".join(lines))


def _fused(total: _Sum, side: str, products: dict[str, _Product], scratch: str) -> str:
    """Lines that compute a sum of which one side is a product."""
    product = products[side]
    width = total.width
    other = total.right if side == total.left else total.left
    if total.op == "add":
        return f"\tfma.rn.{width} \t{total.to}, {product.left}, {product.right}, {other};"
    if side == total.left:
        return (
            f"\tneg.{width} \t{scratch}, {other};\n"
            f"\tfma.rn.{width} \t{total.to}, {product.left}, {product.right}, {scratch};"
        )
    return (
        f"\tneg.{width} \t{scratch}, {product.left};\n"
        f"\tfma.rn.{width} \t{total.to}, {scratch}, {product.right}, {other};"
    )


def _after(lines: str, products: dict[str, _Product]) -> dict[str, _Product]:
    """The products that registers hold after an instruction."""
    line = lines.splitlines()[-1] if lines else ""
    written = _WRITES.match(line)
    if written:
        gone = {register.strip() for register in (written[1] or written[2]).split(",")}
        products = {to: product for to, product in products.items() if not gone & {to, product.left, product.right}}
    made = _PRODUCT.match(line)
    if made:
        width, to, left, right = (part.strip() for part in made.groups())
        if to not in (left, right):
            products[to] = _Product(width, left, right)
    return products
