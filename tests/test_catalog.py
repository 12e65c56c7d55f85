"""The catalog names things that exist."""

import inspect

import pytest

from jattn import catalog


@pytest.mark.parametrize("entry", catalog.CATALOG, ids=lambda entry: entry.name)
def test_names_resolve_and_features_are_arguments(entry):
    parameters = inspect.signature(entry.load_op()).parameters
    assert list(parameters)[:3] == ["query", "key", "value"]
    assert "implementation" in parameters
    argument = {
        "bias": "bias",
        "mask": "mask",
        "lse": "return_lse",
        "segments": "segment_ids",
        "state": "return_state",
        "decay": "log_decay",
        "feature_map": "query_weight",
        "sinks": "sinks",
        "soft_cap": "logits_soft_cap",
    }
    for feature, name in argument.items():
        assert (feature in entry.features) == (name in parameters), feature
    assert set(entry.example) <= set(parameters)
    assert (entry.step is not None) == ("state" in entry.features)
    for reference in (entry.layer, entry.step):
        if reference is not None:
            assert callable(catalog.load(reference))


def test_names_are_unique():
    names = [entry.name for entry in catalog.CATALOG]
    assert len(set(names)) == len(names)


def test_an_unknown_name_gets_a_suggestion():
    with pytest.raises(ValueError, match=r"'lightening'; did you mean 'lightning'\? The catalog has softmax"):
        catalog.get("lightening")
