#!/usr/bin/python3
"""Checks pages of `finrace diagnose --html`. Exit 0: all are sound; 1: some are not; 2: usage.

`check_page.py FILE...`; for tests: complaints(page, report), where `report` is what --json says of the same diagnosis. A page
must be HTML without a fault, load nothing, run nothing, have words for each picture, be of sufficient contrast in each of its
colour schemes, and tell what the report tells.
"""
import re
import sys
from pathlib import Path

import html5lib

XHTML, SVG = "{http://www.w3.org/1999/xhtml}", "{http://www.w3.org/2000/svg}"
# All that a page consists of: nothing here loads, runs, sends or embeds.
ELEMENTS = {XHTML + name for name in (
    "html head meta title style body header nav main section article footer div figure figcaption h1 h2 h3 p ol ul li a code span "
    "time details summary table thead tbody tr th td").split()} | {SVG + name for name in (
        "svg title desc defs pattern rect line circle polygon text").split()}
ATTRIBUTES = set(
    "charset class content cx cy datetime fill height http-equiv id lang name patternTransform patternUnits points r role rx "
    "scope style text-anchor viewBox width x x1 x2 y y1 y2 aria-label aria-labelledby href".split())
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
MOST_SHOWN = 20  # findings, and upstreams, that are told all about: userspace/sink/sentences.h

# What is written, and drawn, on what: WCAG 2.2, 1.4.3 and 1.4.11.
TEXT = [(ink, ground) for ground in ("paper", "panel") for ink in ("ink", "soft", "blue", "amber", "red", "green")]
TEXT += [("on", "red"), ("red", "red-area")]
GRAPHICS = [(ink, "panel") for ink in ("blue", "amber", "red", "faint")]
GRAPHICS += [("amber", "amber-area"), ("amber", "red-area"), ("red", "red-area"), ("blue", "blue-area"), ("blue", "red-area")]
SCHEMES = 3  # light, dark, print


def luminance(colour):
    channels = [int(colour[at:at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def contrasts(sheet):
    """(scheme's number, what, on what, ratio, least) of all pairs."""
    schemes = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root\s*{([^}]*)}", sheet)]
    return [(number, ink, ground, contrast(scheme[ink], scheme[ground]), least)
            for number, scheme in enumerate(schemes, 1)
            for pairs, least in ((TEXT, 4.5), (GRAPHICS, 3)) for ink, ground in pairs]


def words(element):
    return " ".join("".join(element.itertext()).split())


def sheet_complaints(sheet):
    if re.search(r"@import|@font-face|url\(|expression", sheet):
        yield "the style sheet loads something"
    reckoned = contrasts(sheet)
    if len({number for number, *_ in reckoned}) != SCHEMES:
        yield "a colour scheme is missing"
    for number, ink, ground, ratio, least in reckoned:
        if ratio < least:
            yield f"scheme {number}: {ink} on {ground} has a contrast of {ratio:.2f}, not {least}"


def attribute_complaints(element, ids):
    for name, value in element.attrib.items():
        if name not in ATTRIBUTES:
            yield f"<{element.tag} {name}={value!r}>"
        elif name == "href" and not (value.startswith("#") and value[1:] in ids):
            yield f"a link to {value!r}"
        elif name == "fill" and not (re.fullmatch(r"url\(#([\w-]+)\)", value) and value[5:-1] in ids):
            yield f"a fill of {value!r}"
        elif name == "style" and not re.fullmatch(r"--y: [\d.]+", value):
            yield f"a style of {value!r}"
        elif name == "aria-labelledby" and not set(value.split()) <= ids:
            yield f"labelled by {value!r}, which is not there"
        elif value in ("nan%", "inf%", "nan", "inf", "-nan", "-inf"):
            yield f"{name}={value}"


def picture_complaints(picture):
    if picture.get("role") != "img":
        yield "a picture without its role"
    for name in ("title", "desc"):
        told = picture.find(SVG + name)
        if told is None or not words(told) or told.get("id") not in picture.get("aria-labelledby", "").split():
            yield f"a picture without its {name}"


def report_complaints(tree, report):
    """What of the report the page does not tell."""
    def place(of):
        return f"[{of['address']}]:{of['port']}" if ":" in of["address"] else f"{of['address']}:{of['port']}"

    def parts(kind):
        """(heading, all) of each."""
        for one in tree.iter(XHTML + "article"):
            if one.get("class") == kind:
                yield words(next(part for part in one.iter() if part.tag in (XHTML + "h2", XHTML + "h3"))), words(one)

    def settings(of):
        return [one[what] for way in of.get("remedies", []) for one in way["settings"] for what in ("setting", "source")]

    whole = words(tree)
    for kind, all_of_them in (("finding", report["findings"]), ("pool", report["upstreams"])):
        told = list(parts(kind))
        if len(told) != min(len(all_of_them), MOST_SHOWN):
            yield f"{len(told)} of {len(all_of_them)} are told of: {kind}"
        for one, (heading, text) in zip(all_of_them, told):
            above = [place(one.get("upstream") or one.get("listener") or one)] if "other" not in one else []
            if kind == "finding":
                above += [one["cause"]]
                needed = [" ".join(one["message"].split()), *settings(one)]
                needed += one.get("hints", [])
            else:
                needed = [one["state"]]
            yield from (f"{kind}: no {word!r} in its heading" for word in above if word not in heading)
            yield from (f"{kind}: no word of {word!r}" for word in needed if " ".join(word.split()) not in text)
        for one in all_of_them[MOST_SHOWN:]:
            if "other" not in one and place(one.get("upstream") or one.get("listener") or one) not in whole:
                yield f"{kind}: no word of {one}"
    for one in report["upstreams"][:MOST_SHOWN]:
        yield from (f"no word of {word!r}" for word in settings(one) if word not in whole)


def complaints(page, report=None):
    """One text for each thing wrong with this page (a text)."""
    try:
        tree = html5lib.HTMLParser(strict=True).parse(page)
    except html5lib.html5parser.ParseError as error:
        return [f"not well formed: {error}"]
    found = []
    all_of_them = [element for element in tree.iter() if isinstance(element.tag, str)]
    ids = [element.get("id") for element in all_of_them if element.get("id")]
    if len(ids) != len(set(ids)):
        found.append("an id is there twice")
    for element in all_of_them:
        if element.tag not in ELEMENTS:
            found.append(f"<{element.tag}>")
        found += attribute_complaints(element, set(ids))
        if element.tag == SVG + "svg":
            found += picture_complaints(element)
    sheets = [element.text for element in all_of_them if element.tag == XHTML + "style"]
    if len(sheets) != 1:
        return found + [f"{len(sheets)} style sheets"]
    found += sheet_complaints(sheets[0])
    if POLICY not in [element.get("content") for element in all_of_them if element.get("http-equiv") == "Content-Security-Policy"]:
        found.append("no Content-Security-Policy")
    levels = [int(element.tag[-1]) for element in all_of_them if re.fullmatch(re.escape(XHTML) + "h[1-6]", element.tag)]
    if levels.count(1) != 1 or any(after > before + 1 for before, after in zip([0] + levels, levels)):
        found.append(f"headings of levels {levels}")
    if report is not None:
        found += report_complaints(tree, report)
    return found


def main(paths):
    if not paths:
        print(__doc__, file=sys.stderr)
        return 2
    wrong = 0
    for path in paths:
        text = Path(path).read_text(encoding="utf-8")
        for complaint in complaints(text):
            wrong += 1
            print(f"{path}: {complaint}", file=sys.stderr)
        lowest = {least: min(ratio for *_, ratio, needed in contrasts(text) if needed == least) for least in (4.5, 3)}
        print(f"{path}: contrast of text {lowest[4.5]:.2f} and more, of graphics {lowest[3]:.2f} and more")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
