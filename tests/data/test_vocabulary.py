"""Names keep their numbers: order, control, unknown names."""

import numpy as np
import pytest

from scjax.config import from_dict, to_dict
from scjax.data.vocabulary import SPECIAL_TOKENS, Vocabulary

GENES = ("b", "A", "a", "B", "A1")
VOCABULARY = Vocabulary.of(GENES, ("b", "drug", "A", "control", "b"))


def test_tokens_are_specials_genes_and_unmeasured_names_each_in_code_point_order():
    assert VOCABULARY.tokens == ("<pad>", "<cls>", "<mask>", "control", "A", "A1", "B", "a", "b", "drug")
    assert VOCABULARY.perturbations == ("A", "b", "control", "drug")
    assert (VOCABULARY.n_tokens, VOCABULARY.n_perturbations) == (10, 4)
    assert Vocabulary.of(GENES[::-1], ("drug", "A", "b")) == VOCABULARY  # the order of what is given does not matter
    assert hash(Vocabulary.of(GENES[::-1], ("drug", "A", "b"))) == hash(VOCABULARY)


def test_gene_tokens_keep_the_order_of_the_names():
    tokens = VOCABULARY.gene_tokens(GENES)
    assert tokens.dtype == np.int32
    assert [VOCABULARY.tokens[i] for i in tokens] == list(GENES)
    assert VOCABULARY.gene_tokens(()).shape == (0,)


def test_perturbations_as_tokens_and_as_places_in_the_table():
    perturbations = [("b",), (), ("A", "drug"), ("control", "A")]
    tokens = VOCABULARY.encode(perturbations, "gene", 2)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == [[8, 3], [3, 3], [4, 9], [3, 4]]
    assert VOCABULARY.encode(perturbations, "table", 3).tolist() == [[1, 2, 2], [2, 2, 2], [0, 3, 2], [2, 0, 2]]
    assert VOCABULARY.encode([("A1",)], "gene", 1).tolist() == [[5]]  # a gene that no cell was perturbed in


def test_json_round_trip():
    again = from_dict(Vocabulary, to_dict(VOCABULARY))
    assert again == VOCABULARY
    assert again.gene_tokens(["a"]).tolist() == [7]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VOCABULARY.gene_tokens(["drugs"]), "'drugs' is not among the 6 genes .* Did you mean 'drug'"),
        (lambda: VOCABULARY.gene_tokens(["<pad>"]), "'<pad>' is not among"),
        (lambda: VOCABULARY.encode([("A1",)], "table", 1), "'A1' is not among the 3 perturbations of the data"),
        (lambda: VOCABULARY.encode([("drogue",)], "gene", 1), "'drogue' is not among the 6 genes .* mean 'drug'"),
        (lambda: VOCABULARY.encode([("<mask>",)], "gene", 1), "'<mask>' is not among"),
        (lambda: VOCABULARY.encode([("A", "b")], "gene", 1), "'A.b' has 2 parts, there are n_slots=1"),
        (lambda: VOCABULARY.encode([("A",)], "gene", 0), "n_slots must be at least 1"),
        (lambda: Vocabulary.of(("control", "a"), ()), "is called 'control', which has a meaning"),
        (lambda: Vocabulary.of(("a",), ("<cls>",)), "is called '<cls>'"),
        (lambda: Vocabulary.of(("a", "a"), ()), "tokens must be unique; 'a'"),
        (lambda: Vocabulary(tokens=("a",), perturbations=("control",)), "must begin with <pad>"),
        (lambda: Vocabulary(tokens=SPECIAL_TOKENS, perturbations=("a",)), "must hold 'control'"),
        (lambda: Vocabulary(tokens=SPECIAL_TOKENS, perturbations=("control",) * 2), "perturbations must be unique"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
