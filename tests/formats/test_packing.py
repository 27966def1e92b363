"""Dense bit streams in int32 words."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmquant.formats.packing import pack_rows, unpack_rows

few = settings(max_examples=100, deadline=None)
sizes = st.tuples(st.integers(1, 5), st.integers(1, 100))
seeds = st.integers(0, 10**6)


def random_codes(size: tuple[int, int], bits: int, seed: int) -> Tensor:
    return torch.randint(2**bits, size, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def words_of(codes: list[int], bits: int) -> list[int]:
    """The packed words of one row, as unsigned numbers."""
    return [word % 2**32 for word in pack_rows(torch.tensor([codes], dtype=torch.uint8), bits)[0].tolist()]


@few
@given(sizes, st.integers(2, 8), seeds)
def test_unpacking_inverts_packing_for_every_width_and_odd_sizes(size: tuple[int, int], bits: int, seed: int) -> None:
    codes = random_codes(size, bits, seed)
    words = pack_rows(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (size[0], -(-size[1] * bits // 32))
    assert words.is_contiguous()
    assert torch.equal(unpack_rows(words, bits, size[1]), codes)


@few
@given(sizes, st.integers(2, 8), seeds)
def test_packing_inverts_unpacking_of_any_words(size: tuple[int, int], bits: int, seed: int) -> None:
    # 32 codes fill whole words, so every bit of the words counts.
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, (size[0], bits * 2), generator=generator).to(torch.int32)
    assert torch.equal(pack_rows(unpack_rows(words, bits, 64), bits), words)


@few
@given(sizes, st.integers(2, 8), seeds)
def test_a_row_is_the_number_sum_of_code_i_times_2_to_the_i_bits(size: tuple[int, int], bits: int, seed: int) -> None:
    codes = random_codes(size, bits, seed)
    for row in codes.tolist():
        number = sum(code << (bits * i) for i, code in enumerate(row))
        assert number == sum(word << (32 * i) for i, word in enumerate(words_of(row, bits)))


@few
@given(sizes, st.sampled_from([2, 3, 4, 8]), seeds)
def test_words_equal_those_of_compressed_tensors(size: tuple[int, int], bits: int, seed: int) -> None:
    codes = random_codes(size, bits, seed)
    signed = (codes.short() - 2 ** (bits - 1)).to(torch.int8)
    theirs = pack_to_int32(signed, bits)
    assert torch.equal(pack_rows(codes, bits), theirs)
    assert torch.equal(unpack_from_int32(pack_rows(codes, bits), bits, torch.Size(size)), signed)
    assert torch.equal(unpack_rows(theirs, bits, size[1]), codes)


def test_two_bit_words() -> None:
    """0, 1, 2, 3 from the lowest bit up: 11 10 01 00 = 0xE4 in each byte."""
    assert words_of([0, 1, 2, 3] * 4, 2) == [0xE4E4E4E4]
    assert words_of([3] * 16 + [1], 2) == [0xFFFFFFFF, 0x00000001]


def test_three_bit_words() -> None:
    """Three bits are one octal digit, the first code the last digit: 0o51076543210 has 33 bits.

    Its low 32 bits, 01 001 000 111 110 101 100 011 010 001 000 (the top digit 5 = 101 loses its first 1), are
    0100 1000 1111 1010 1100 0110 1000 1000 = 0x48FAC688, and that 1 is the lowest bit of the second word.
    """
    assert words_of([0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 5], 3) == [0x48FAC688, 0x00000001]


def test_four_bit_words() -> None:
    """One hexadecimal digit a code, the first code the last digit."""
    assert words_of(list(range(16)), 4) == [0x76543210, 0xFEDCBA98]
    assert words_of([15, 1, 2], 4) == [0x0000021F]


def test_eight_bit_words() -> None:
    """One byte a code, the first code the lowest byte."""
    assert words_of([0x00, 0x7F, 0x80, 0xFF, 0x12], 8) == [0xFF807F00, 0x00000012]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rows_are_packed_apart_and_padded_with_zero_bits(bits: int) -> None:
    codes = random_codes((4, 13), bits, seed=bits)
    assert torch.equal(pack_rows(codes, bits), torch.cat([pack_rows(row[None], bits) for row in codes]))
    assert words_of(codes[0].tolist(), bits)[-1] >> (13 * bits % 32) == 0


def test_codes_and_words_may_lie_transposed_in_memory() -> None:
    codes = random_codes((40, 6), 4, seed=0).T
    words = pack_rows(codes, 4)
    assert torch.equal(words, pack_rows(codes.contiguous(), 4))
    assert torch.equal(unpack_rows(words.T.contiguous().T, 4, 40), codes)
