"""Plain text and Markdown by hand, and what becomes of blocks."""

from __future__ import annotations

from preceptor.data.articles.markup import (
    HOLE,
    Block,
    article_text,
    document_title,
    markdown_blocks,
    plain_blocks,
    readable_formula,
)

MARKDOWN = """---
title: not this
---
# The Heron

The *grey* heron is a [long-legged](http://x.example/y) wader.[^1] It
eats `fish` ![photo](h.png) & frogs.

| a | b |
|---|---|
| 1 | 2 |

## Habits

- It stands still.
- standing

```python
code = "dropped"
```

> It nests in trees.

<div>raw</div>

[^1]: A footnote that is dropped.

## References

- A book. It is dropped.

### Subsection of references

Also dropped.

## Range

It lives in Europe.
"""


def test_blocks_become_text() -> None:
    blocks = [
        Block("heading", "Title", 1),
        Block("paragraph", " It\u00a0is  old.[12][n 3] It is x\u200b[citation needed]. [1, 2] and a[7] stay or go. "),
        Block("item", "A caption"),
        Block("item", "It ends “well.”"),
        Block("heading", "Notes", 2),
        Block("paragraph", "Gone."),
        Block("heading", "Deeper", 3),
        Block("paragraph", "Gone too."),
        Block("heading", "Later [edit]", 2),
        Block("paragraph", "Kept."),
    ]
    assert article_text(blocks) == "It is old. It is x. [1, 2] and a stay or go.\n\nIt ends “well.”\n\n\nKept."
    assert document_title(blocks) == "Title"
    assert document_title(blocks[1:]) is None
    assert document_title([Block("heading", "Second level", 2)]) is None
    assert article_text([]) == ""


def test_plain() -> None:
    text = "First\nof one. Two = 2 == 2.\r\n\r\n== Head = ing ==\n - an item\n goes on.\n* other.\n=== S ===\nx.\n\ny."
    assert plain_blocks(text) == [
        Block("paragraph", "First of one. Two = 2 == 2."),
        Block("heading", "Head = ing", 2),
        Block("item", "an item goes on."),
        Block("item", "other."),
        Block("heading", "S", 3),
        Block("paragraph", "x."),
        Block("paragraph", "y."),
    ]


def test_markdown() -> None:
    blocks = markdown_blocks(MARKDOWN)
    assert document_title(blocks) == "The Heron"
    assert article_text(blocks) == (
        "The grey heron is a long-legged wader. It eats fish & frogs.\n\n\n"
        "It stands still.\n\nIt nests in trees.\n\n\n"
        "It lives in Europe."
    )


def test_a_sentence_with_a_hole_is_left_out() -> None:
    blocks = [
        Block("heading", f"On {HOLE}", 1),
        Block("paragraph", f"It is even. If {HOLE} is odd, it is not. It ends."),
        Block("item", f"Only {HOLE} here."),
    ]
    assert document_title(blocks) == "On"
    assert article_text(blocks) == "It is even. It ends."


def test_formulas_that_read_as_text() -> None:
    assert readable_formula(" x^2 ") == readable_formula("{\\displaystyle x^2}") == "x^2"
    assert (
        readable_formula("\\frac{1}{2}") == readable_formula("{\\displaystyle \\pi }") == readable_formula(" ") == HOLE
    )
