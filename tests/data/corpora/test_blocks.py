from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preceptor.data.corpora.blocks import TokenBlocks, pack_blocks, pad_blocks, split_held_out, tokenise
from preceptor.errors import ConfigError, DataError

# The first token of a document says which it is, so that every position of the corpus is a different token.
documents = st.lists(st.integers(1, 12), min_size=1, max_size=8).map(
    lambda lengths: [[1000 * number + place for place in range(length)] for number, length in enumerate(lengths)]
)


def rows(blocks: TokenBlocks) -> list[list[int]]:
    return [block.tolist() for block in blocks]


def test_blocks_are_views_of_what_was_given():
    given = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    blocks = TokenBlocks("d", given)
    assert len(blocks) == 3
    assert rows(blocks) == given
    assert blocks[-1].tolist() == given[-1]
    assert blocks[0].dtype == torch.int64
    assert blocks.num_tokens == 9
    for outside in (3, -4):
        with pytest.raises(IndexError, match="'d' has 3 blocks"):
            blocks[outside]


def test_too_short_a_block_is_refused():
    with pytest.raises(DataError, match="dataset 'd' has a block of fewer than two tokens"):
        TokenBlocks("d", [[1, 2], [3]])


def test_no_blocks_at_all():
    assert len(TokenBlocks("d", [])) == 0
    assert len(pack_blocks("d", [[5], []], block_length=4)) == 0


def test_tokenise_begins_and_ends_each_document():
    encode = lambda text: [ord(letter) for letter in text]  # noqa: E731
    assert tokenise(["ab", "c"], encode=encode, begin=0, end=1) == [[0, 97, 98, 1], [0, 99, 1]]


@given(documents, st.integers(2, 6), st.booleans())
def test_every_token_is_predicted_once(documents, block_length, cross_documents):
    blocks = pack_blocks("d", documents, block_length=block_length, cross_documents=cross_documents)
    predicted = Counter(token for block in rows(blocks) for token in block[1:])
    firsts = [documents[0][0]] if cross_documents else [document[0] for document in documents]
    every = Counter(token for document in documents for token in document)
    assert predicted == every - Counter(firsts)


@given(documents, st.integers(2, 6))
def test_blocks_stay_within_a_document_unless_asked(documents, block_length):
    within = rows(pack_blocks("d", documents, block_length=block_length))
    assert all(len({token // 1000 for token in block}) == 1 for block in within)
    across = rows(pack_blocks("d", documents, block_length=block_length, cross_documents=True))
    assert all(len(block) == block_length for block in across[:-1])
    # The order of the corpus is kept.
    for blocks in (within, across):
        flat = [token for block in blocks for token in block]
        assert flat == sorted(flat)


def test_blocks_need_room_for_a_prediction():
    with pytest.raises(ConfigError, match="at least 2 tokens"):
        pack_blocks("d", [[1, 2]], block_length=1)


@given(documents, st.sampled_from([0.1, 0.25, 0.5]))
def test_nothing_is_both_trained_on_and_held_out(documents, fraction):
    try:
        train, held_out = split_held_out(documents, fraction=fraction)
    except DataError:
        assert max(len(document) for document in documents) < 3
        return
    firsts = {document[0] for document in documents}
    seen = [{token for document in part for token in document} for part in (train, held_out)]
    # A document that is cut gives its begin token to both parts.
    assert (seen[0] & seen[1]) <= firsts
    assert seen[0] | seen[1] == {token for document in documents for token in document}
    assert held_out


def test_held_out_documents_are_spread_over_the_corpus():
    documents = [[0, number] for number in range(100)]
    train, held_out = split_held_out(documents, fraction=0.1)
    assert [document[1] for document in held_out] == list(range(9, 100, 10))
    assert len(train) == 90


def test_one_long_document_gives_its_tail():
    train, held_out = split_held_out([list(range(101))], fraction=0.1)
    assert train == [list(range(91))]
    assert held_out == [[0, *range(91, 101)]]


def test_holding_out_nothing():
    assert split_held_out([[0, 1]], fraction=0) == ([[0, 1]], [])


def test_too_little_to_hold_out():
    with pytest.raises(DataError, match="too few and short"):
        split_held_out([[0, 1]], fraction=0.1)
    with pytest.raises(ConfigError, match=r"\[0, 0.5\], got 0.9"):
        split_held_out([[0, 1]], fraction=0.9)


def test_padding_is_masked():
    batch = pad_blocks([torch.tensor([1, 2]), torch.tensor([3]), torch.tensor([4, 5, 6])], filler=7)
    assert batch.tokens.tolist() == [[1, 2, 7], [3, 7, 7], [4, 5, 6]]
    assert batch.token_mask.tolist() == [[True, True, False], [True, False, False], [True, True, True]]
