"""What counts as an answer, and that nothing but model and question decides it."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from evaluation_case import question, statement, tiny_lm, tiny_tokenizer
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import GenerationConfig

from selectune.data.collate import collate
from selectune.data.examples import Example
from selectune.data.tokens import tokenize
from selectune.errors import ConfigError, CoverageError, DataError, TrainingError
from selectune.evaluation.answers import find_answer
from selectune.evaluation.generation import Generation, generate_answers


def _questions(n: int = 8) -> list[Example]:
    rng = random.Random(3)
    return [question(k, rng) for k in range(n)]


def _ask(model: nn.Module, examples: Sequence[Example], **options: object) -> Generation:
    settings = {"max_length": 120, "pad_id": 0, "slack": 4} | options
    return generate_answers(model, examples, tiny_tokenizer(), **settings)


@pytest.mark.parametrize(
    ("words", "options", "expected"),
    [
        (" the bank", [" the bank", " a river"], 0),
        ("  The   BANK.", [" the bank", " a river"], 0),
        ("It is a river, not the bank", [" the bank", " a river"], 0),
        ("I know", [" no", " yes"], None),
        ("no. No! yes", [" no", " yes"], 1),
        ("the river bank", [" bank", " river bank", " the river"], 1),
        ("bank of the river", [" bank", " bank of the river"], 1),
        ("a a a", [" a a", " a"], 0),
        ("", [" a", " b"], None),
        ("the answer is B because a letter is asked for", ["A", "B"], 1),
        ("the answer: a", ["A", "B"], None),
        ("(B)", ["A", "B"], 1),
        ("it costs 15", [" 5", " 1"], None),
        ("it costs 1.5", [" 5", " 1"], None),
        ("it costs 1,500", [" 500", " 1"], None),
        ("it is -5", [" 5", " -5"], 1),
        ("it is -5", [" 5", " 6"], None),
        ("about 5, or so. 6.", [" 5", " 6"], 1),
        ("it is 5%", [" 5", " 5%"], 1),
        ("don’t", [" don't", " do"], 0),  # noqa: RUF001
        ("答案是北京。", ["上海", "北京"], 1),
        ("答案是Paris。", ["Rome", "Paris"], 1),
        ("ＡＢＣ", ["abc", "b"], 0),  # noqa: RUF001
        ("He went home", [" He went home.", " He stayed."], 0),
        ("???", ["?", "!"], 0),
        ("1 + 1 (two)", [" (two)", " (three)"], 0),
        ("the Bank", [" bank", " Bank"], 0),
    ],
)
def test_the_answer_is_the_last_option_that_occurs(
    words: str, options: list[str], expected: int | None
) -> None:
    assert find_answer(words, options) == expected


def test_options_that_are_alike_are_one_answer() -> None:
    model = _taught([replace(q, options=(" Go", " go"), answer=1) for q in _questions(1)])
    asked = [replace(q, options=(" Go", " go"), answer=1) for q in _questions(1)]
    row = _ask(model, asked).table.to_pylist()[0]
    assert (row["given"], row["is_right"]) == (0, True)


def _taught(examples: Sequence[Example]) -> nn.Module:
    """Return a model that knows these answers by heart, and when to end them.

    How many steps that takes is up to the processor's rounding.
    """
    model = tiny_lm("llama")
    model.generation_config.eos_token_id = 1
    content = [
        replace(e, content=dict(e.content) | {"completion": e.options[e.answer]}) for e in examples
    ]
    items = tokenize(content, tiny_tokenizer(), max_length=120)
    batch = collate(list(items), pad_id=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(500):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.01:
            return model
    raise AssertionError("the model has not learnt four answers")


def test_a_model_that_learnt_the_answers_gives_them_and_one_that_did_not_does_not() -> None:
    asked = _questions(4)
    found = _ask(_taught(asked), asked)
    assert [words.strip() for words in found.column("generated")] == [
        q.options[q.answer].strip() for q in asked
    ]
    assert (found.accuracy, found.n_unparsed) == (1.0, 0)
    assert _ask(tiny_lm("llama"), asked).accuracy < 1.0


def test_wrong_and_unparsed_answers_are_told_apart() -> None:
    asked = _questions(4)
    model = _taught(asked)
    other = [replace(asked[0], answer=(asked[0].answer + 1) % len(asked[0].options))]
    absent = [replace(asked[1], options=("zz", "yy"), answer=0)]
    found = _ask(model, [*other, *absent, *asked[2:]])
    assert found.column("is_parsed") == [True, False, True, True]
    assert found.column("is_right") == [False, False, True, True]
    assert found.column("given")[0] == asked[0].answer
    assert found.column("given")[1] is None
    assert found.to_json() == {
        "n": 4,
        "accuracy": 0.5,
        "n_unparsed": 1,
        "n_truncated": 0,
        "left_out": [],
    }


def test_order_and_size_of_batches_change_nothing() -> None:
    model, asked = tiny_lm("llama"), _questions()
    expected = {row["id"]: row for row in _ask(model, asked).table.to_pylist()}
    for budget, order in ((1, asked), (150, asked[::-1])):
        found = _ask(model, order, token_budget=budget)
        assert found.column("id") == [example.id for example in order]
        assert all(row == expected[row["id"]] for row in found.table.to_pylist())


def test_a_question_has_the_room_of_its_own_options_whatever_the_others_need() -> None:
    short, long = _questions(2)
    short = replace(short, options=(" a", " to"), answer=0)
    long = replace(long, options=(" sleep" * 4, " a"), answer=0)
    model = tiny_lm("gpt2")
    alone = _ask(model, [short]).column("generated")
    assert _ask(model, [long, short]).column("generated")[1:] == alone


def test_examples_without_options_are_left_out_and_named() -> None:
    rng = random.Random(0)
    told, asked = [statement(k, rng) for k in range(2)], _questions(3)
    found = _ask(tiny_lm("llama"), [told[0], *asked, told[1]])
    assert found.left_out == (told[0].id, told[1].id)
    assert found.column("id") == [example.id for example in asked]


def test_the_model_decodes_greedily_whatever_its_own_habits_and_keeps_them() -> None:
    asked, plain = _questions(), tiny_lm("llama")
    expected = _ask(plain, asked).column("generated")
    model = tiny_lm("llama")
    habits = GenerationConfig(
        do_sample=True,
        temperature=5.0,
        repetition_penalty=3.0,
        num_beams=3,
        min_new_tokens=3,
        suppress_tokens=[10, 11, 12, 13],
        no_repeat_ngram_size=1,
        max_length=9,
        eos_token_id=plain.generation_config.eos_token_id,
    )
    model.generation_config = habits
    model.config.use_cache = False
    assert _ask(model, asked).column("generated") == expected
    assert model.generation_config is habits


def test_every_end_token_of_the_generation_config_ends_an_answer() -> None:
    model, asked = tiny_lm("llama"), _questions(4)
    model.generation_config.eos_token_id = None
    assert all(_ask(model, asked).column("generated"))
    model.generation_config.eos_token_id = list(range(2, 48))
    assert _ask(model, asked).column("generated") == [""] * 4


def test_the_model_is_left_as_it_was_and_dropout_is_off_meanwhile() -> None:
    model, asked = tiny_lm("gpt2").train(), _questions()  # GPT-2 drops 10 %
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    once = _ask(model, asked)
    assert _ask(model, asked).table.equals(once.table)
    assert [module.training for module in model.modules()] == before


def test_an_adapter_takes_part() -> None:
    asked = _questions()
    base = _ask(tiny_lm("llama"), asked).column("generated")
    model = get_peft_model(
        tiny_lm("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "o_proj"])
    )
    assert _ask(model, asked).column("generated") == base
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn_like(p))
    adapted = _ask(model, asked).column("generated")
    assert adapted != base
    assert _ask(model.merge_and_unload(), asked).column("generated") == adapted


def test_a_prompt_that_is_too_long_loses_its_beginning() -> None:
    tokenizer, n_cut = tiny_tokenizer(), 5
    model = tiny_lm("gpt2")
    n_differ = 0
    for asked in (replace(q, options=(" a", " to"), answer=0) for q in _questions()):
        ids = tokenizer(asked.content["prompt"])["input_ids"]
        cut = tokenizer.decode(ids[n_cut:])
        shorter = replace(asked, content=dict(asked.content) | {"prompt": cut})
        n_answer = 2 + 4  # " a" is two tokens here; and the slack
        found = _ask(model, [asked], max_length=len(ids) - n_cut + n_answer)
        assert found.n_truncated == 1
        assert found.column("generated") == _ask(model, [shorter]).column("generated")
        n_differ += found.column("generated") != _ask(model, [asked]).column("generated")
    assert n_differ > 0


def test_bfloat16_runs_under_autocast() -> None:
    dtypes: list[torch.dtype] = []
    model = tiny_lm("llama")
    model.lm_head.register_forward_hook(lambda module, inputs, out: dtypes.append(out.dtype))
    assert _ask(model, _questions(2), precision="bfloat16").n == 2
    assert set(dtypes) == {torch.bfloat16}


def test_progress_counts_questions() -> None:
    done: list[int] = []
    _ask(tiny_lm("llama"), _questions(), token_budget=150, advance=done.append)
    assert sum(done) == 8
    assert len(done) > 1


def test_logits_that_are_no_numbers_name_the_question() -> None:
    model = tiny_lm("llama").train()
    with torch.no_grad():
        model.lm_head.weight[:] = math.nan
    with pytest.raises(TrainingError, match=r"where: example q\d-0"):
        _ask(model, _questions(2))
    assert model.training


def test_nothing_to_ask_is_an_error() -> None:
    with pytest.raises(DataError, match="no examples given"):
        _ask(tiny_lm("llama"), [])
    with pytest.raises(DataError, match="has options"):
        _ask(tiny_lm("llama"), [statement(0, random.Random(0))])


def test_a_question_without_room_or_prompt_is_named() -> None:
    asked = _questions(1)[0]
    with pytest.raises(DataError, match="may take") as caught:
        _ask(tiny_lm("llama"), [asked], max_length=6)
    assert caught.value.where == asked.origin
    content = {"prompt": "", "completion": " a river"}
    empty = replace(asked, content=content, options=(" a river", " a stone"), answer=0)
    with pytest.raises(DataError, match="its prompt is empty"):
        _ask(tiny_lm("llama"), [empty])


def test_a_question_that_does_not_say_what_is_right_is_refused() -> None:
    with pytest.raises(DataError, match="which of its options is right"):
        _ask(tiny_lm("llama"), [replace(_questions(1)[0], answer=-1)])


def test_a_negative_slack_is_refused() -> None:
    with pytest.raises(ConfigError, match="slack is -1"):
        _ask(tiny_lm("llama"), _questions(1), slack=-1)


def test_models_that_cannot_write_are_refused() -> None:
    with pytest.raises(CoverageError, match="a causal LM of transformers"):
        _ask(nn.Linear(2, 2), _questions(1))
    prefixed = get_peft_model(
        tiny_lm("gpt2"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(CoverageError, match="virtual tokens"):
        _ask(prefixed, _questions(1))
