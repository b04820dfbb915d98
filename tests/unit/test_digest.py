import hashlib

from hypothesis import given, settings
from hypothesis import strategies as st

from farm.digest import answers_digest

Answer = tuple[str, str | None]

A: Answer = ("a", "7,1,2,3,4")
B: Answer = ("b", None)

names = st.text(st.characters(codec="utf-8", exclude_characters="\t\n"), min_size=1, max_size=8)
five = st.lists(st.integers(0, 999), min_size=5, max_size=5, unique=True).map(lambda found: ",".join(map(str, found)))
answers = st.lists(st.tuples(names, st.none() | five), unique_by=lambda answer: answer[0], max_size=6)
relaxed = settings(deadline=None)


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_a_line_is_name_tab_and_the_answer() -> None:
    assert answers_digest([A]) == sha256("a\t7,1,2,3,4\n")


def test_a_failed_sample_is_an_exclamation_mark() -> None:
    assert answers_digest([A, B]) == sha256("a\t7,1,2,3,4\nb\t!\n")


def test_no_answers_are_the_digest_of_nothing() -> None:
    assert answers_digest([]) == sha256("")


def test_lines_stand_in_byte_order_of_the_names() -> None:
    unsorted: list[Answer] = [("é", None), ("a", None), ("z", None), ("B", None), ("a1", None), ("a-", None)]

    assert answers_digest(unsorted) == sha256("B\t!\na\t!\na-\t!\na1\t!\nz\t!\né\t!\n")


@relaxed
@given(given_answers=answers, data=st.data())
def test_the_order_in_which_answers_come_does_not_matter(given_answers: list[Answer], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(given_answers), label="shuffled")

    assert answers_digest(shuffled) == answers_digest(given_answers)


def test_the_order_of_the_classes_matters() -> None:
    assert answers_digest([("a", "1,7,2,3,4")]) != answers_digest([A])


def test_answers_may_come_from_a_generator() -> None:
    assert answers_digest(answer for answer in (B, A)) == answers_digest([A, B])
