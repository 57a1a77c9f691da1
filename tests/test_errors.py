"""One message: what was got, what was expected, what to do."""

import pytest

from cdl_edge.errors import InputError, choose


def test_the_message_has_its_four_parts_in_order():
    text = str(InputError("no", got=1, expected="2", fix="count"))
    assert text.splitlines() == ["no", "  got:      1", "  expected: 2", "  do:       count"]


def test_parts_not_given_are_left_out_and_false_values_are_shown():
    assert str(InputError("no")) == "no"
    assert "got:      0" in str(InputError("no", got=0))


def test_choose_returns_what_is_there():
    assert choose("fruit", "pear", ["apple", "pear"]) == "pear"


def test_choose_lists_all_and_names_the_closest():
    with pytest.raises(InputError) as info:
        choose("fruit", "aple", {"pear": 1, "apple": 2})
    text = str(info.value)
    assert "unknown fruit" in text and "'aple'" in text
    assert "one of apple, pear" in text and "did you mean 'apple'?" in text


def test_choose_guesses_nothing_when_nothing_is_close():
    with pytest.raises(InputError) as info:
        choose("fruit", "zzz", ["apple", "pear"])
    assert "did you mean" not in str(info.value)


def test_choose_does_not_print_a_list_of_hundreds():
    with pytest.raises(InputError) as info:
        choose("model", "vit_39x9", [f"vit_{i:03d}" for i in range(400)])
    text = str(info.value)
    assert "400 names" in text and "vit_399" in text and len(text) < 300
