"""Chats: both formats, the loss mask with and without generation blocks, malformed lines."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import TEMPLATE, byte_tokenizer

import specjax as sj
from specjax.corpus.chats import read_chats, read_conversations, read_prompts
from specjax.corpus.conversation import Conversation, answer_tokens
from specjax.corpus.features import with_features
from specjax.corpus.split import joined, split, turns
from specjax.training.packing import packed

# ChatML, whose line break after the EOS the model never says; the same with blocks; one that rewrites earlier turns.
CHATML = (
    "{% for m in messages %}{{ '<|s|>' + m['role'] + '\n' + m['content'] + '<|e|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|s|>assistant\n' }}{% endif %}"
)
BLOCKS = (
    "{% for m in messages %}{{ '<|s|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|e|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|e|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|s|>assistant\n' }}{% endif %}"
)
REWRITING = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}"
    "{{ m['content'] if loop.last else m['content'] | upper }}{{ '<|e|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "Hé, you"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "no"},
    {"role": "user", "content": "bye"},
]


@pytest.mark.parametrize("template", [CHATML, BLOCKS])
def test_the_mask_is_all_assistant_turns_with_their_end(template):
    tokenizer = byte_tokenizer(template, ("<|s|>", "<|e|>"), eos="<|e|>")
    ids, said = tokenizer.encode_chat(CHAT)
    assert ids == tokenizer.apply_chat_template(CHAT, add_generation_prompt=False)
    edges = np.flatnonzero(np.diff([0, *said, 0])).reshape(-1, 2)
    spoken = [tokenizer.decode(ids[a:b], skip_special_tokens=False) for a, b in edges]
    assert spoken == ["Hé, you<|e|>", "no<|e|>"]
    # What stands before a turn is what the model is given to answer.
    assert ids[: edges[1][0]] == tokenizer.apply_chat_template(CHAT[:4])


def test_blocks_leave_no_trace_in_the_text():
    plain, blocks = (byte_tokenizer(t, ("<|s|>", "<|e|>"), eos="<|e|>") for t in (CHATML, BLOCKS))
    assert plain.render_chat(CHAT) == blocks.render_chat(CHAT)
    with pytest.raises(sj.PromptError, match="message 0 holds a Unicode noncharacter"):
        blocks.render_chat([{"role": "user", "content": "\ufdd0"}])


def test_without_an_eos_the_whole_turn_counts():
    tokenizer = byte_tokenizer(TEMPLATE.replace("<a>", "<assistant>"))
    ids, said = tokenizer.encode_chat(CHAT[1:3])
    assert tokenizer.decode([i for i, inside in zip(ids, said, strict=True) if inside]) == "Hé, you"


def test_smollm2(smollm2):
    ids, said = smollm2.tokenizer.encode_chat(CHAT[1:])
    assert smollm2.tokenizer.decode([i for i, s in zip(ids, said, strict=True) if s], skip_special_tokens=False) == (
        "Hé, you<|im_end|>no<|im_end|>"
    )


def test_a_template_that_rewrites_is_refused(tmp_path):
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": CHAT}))
    tokenizer = byte_tokenizer(REWRITING, ("<|e|>",), eos="<|e|>")
    with pytest.raises(sj.DataError, match=r"c\.jsonl:1: .*differently once message 2 is added.*generation"):
        read_conversations(tmp_path / "c.jsonl", tokenizer, max_tokens=100)


def sharegpt(messages):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in messages]}


def test_both_formats_give_the_same_conversations(tmp_path):
    file = tmp_path / "c.jsonl"
    file.write_text(json.dumps({"messages": CHAT}) + "\n\n" + json.dumps(sharegpt(CHAT)) + "\n", "utf-8")
    assert read_chats(file) == [(f"{file}:1", CHAT, None), (f"{file}:3", CHAT, None)]
    tokenizer = byte_tokenizer(CHATML, ("<|s|>", "<|e|>"), eos="<|e|>")
    one, two = read_conversations(file, tokenizer, max_tokens=500)
    np.testing.assert_array_equal(one.answer, two.answer)
    text = tokenizer.decode(one.answer, skip_special_tokens=False)
    assert text == "Hé, you<|e|>\n<|s|>user\nmore<|e|>\n<|s|>assistant\nno<|e|>"  # to the last assistant turn's end
    said = one.answer[one.mask]
    assert tokenizer.decode(said, skip_special_tokens=False) == "Hé, you<|e|>no<|e|>"
    lines = []
    (cut, _) = read_conversations(file, tokenizer, max_tokens=len(one.prompt) + 3, report=lines.append)
    assert tokenizer.decode(cut.answer) == "Hé"
    assert "of 2 chats" in lines[0]
    assert "2 have answers beyond" in lines[0]
    assert "0 have none before that and are left out" in lines[0]
    long = [{"role": "user", "content": "much " * 100}, CHAT[2]]
    file.write_text(file.read_text("utf-8") + json.dumps({"messages": long}) + "\n", "utf-8")
    assert len(read_conversations(file, tokenizer, max_tokens=400, report=lines.append)) == 2
    assert "of 3 chats" in lines[1]
    assert "1 have none before that and are left out" in lines[1]
    with pytest.raises(sj.DataError, match=r"no chat in .* has an answer within its first 5 tokens"):
        read_conversations(file, tokenizer, max_tokens=5)


def test_turns_train_apart_and_rows_mark_them(model):
    item = Conversation(np.array([1, 2]), np.arange(3, 10), mask=np.array([1, 1, 0, 0, 1, 1, 1], bool))
    (item,) = with_features(model, [item])
    parts = [(before.tolist(), tokens.tolist()) for before, tokens, _ in turns(item)]
    assert parts == [([1, 2], [3, 4]), ([1, 2, 3, 4, 5, 6], [7, 8, 9])]
    made = joined([item])
    assert made.tokens.tolist() == [3, 4, 7, 8, 9]
    assert made.lengths.tolist() == [2, 3]
    np.testing.assert_array_equal(made.features, item.features[[0, 1, 4, 5, 6]])
    batch = next(iter(packed([item], length=9, batch_size=1, seed=0)))
    assert batch["answer"][0].tolist() == [False] * 2 + item.mask.tolist()


def halves(directory, chats):
    """The chats to train on and those to evaluate with, made of (user, assistant, user, ...)."""
    file = directory / "c.jsonl"
    names = ("user", "assistant") * 4
    lines = [{"messages": [{"role": r, "content": t} for r, t in zip(names, chat, strict=False)]} for chat in chats]
    file.write_text("\n".join(map(json.dumps, lines)))
    return split(read_conversations(file, TURNED, max_tokens=1000), 0.3)


TURNED = byte_tokenizer(CHATML, ("<|s|>", "<|e|>"), eos="<|e|>")


def asked(data):
    """The first user turns."""
    return {TURNED.decode(item.prompt).split("\n")[1] for item in data}


def spoken(data):
    """What the assistant says in every chat, turn by turn."""
    return {tuple(TURNED.decode(tokens) for _, tokens, _ in turns(item)) for item in data}


def test_turns_that_recur_are_context_to_the_others(tmp_path):
    alone = [[f"ask {i}", f"answer number {i}"] for i in range(40)]
    plain = halves(tmp_path, alone)
    sides = [asked(part) for part in plain]
    assert len(sides[0] | sides[1]) == 40
    assert min(map(len, sides)) > 5
    recurring = [
        [[*chat, "Thanks!", "You're welcome!"] for chat in alone],
        [[ask, "Yes.", "so?", answer] for ask, answer in alone],
        [[ask, "Yes.", "so?", answer, "and?", "No.", "then?", f"{answer} more"] for ask, answer in alone],
    ]
    for chats in recurring:
        training, evaluation = halves(tmp_path, chats)
        assert [asked(training), asked(evaluation)] == sides  # whatever else is said, prompts stay on their sides
        said = {turn for chat in spoken(training) for turn in chat}
        assert not said & {turn for chat in spoken(evaluation) for turn in chat}
        assert {chat[0] for chat in spoken(evaluation)} == {chat[0] for chat in spoken(plain.evaluation)}
        for item in evaluation:  # all that stood before is still there
            text = TURNED.decode([*item.prompt, *item.answer], skip_special_tokens=False)
            chat = next(chat for chat in chats if f"{chat[0]}<|e|>" in text)
            assert (
                text
                == TURNED.render_chat(
                    [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(chat)],
                    add_generation_prompt=False,
                )[: len(text)]
            )
    assert {len(chat) for chat in spoken(evaluation)} == {2}  # two of the four turns of the last kind recur


def test_features_stay_beside_their_tokens():
    features = np.arange(6.0)[:, None]
    said = np.array([1, 1, 0, 1, 0, 1], bool)
    chats = [Conversation(np.array([i]), np.array([7, 8, 0, i, 0, 9]), features, said) for i in range(30)]
    told = []
    training, evaluation = split(chats, 0.5, told.append)
    assert training
    assert [message.partition(" are")[0] for message in told] == [
        f"{2 * len(evaluation)} assistant turns of held-out conversations"
    ]
    assert answer_tokens(chats) == 4 * len(chats)
    # Of two held-out chats that say the same but for that, one is evaluated on, and its turns alone count.
    pairs = [dataclasses.replace(item, answer=np.array([7, 8, 0, i // 2, 0, 9])) for i, item in enumerate(chats)]
    told.clear()
    fewer = split(pairs, 0.5, told.append).evaluation
    assert len(fewer) < len(evaluation)
    assert told[-1].startswith(f"{2 * len(fewer)} assistant turns of held-out")
    for item in evaluation:
        (prompt, answer) = (item.prompt.tolist(), item.answer.tolist())
        number = prompt[0]
        assert (prompt, answer) == ([number, 7, 8, 0], [number])
        assert (item.features.tolist(), item.mask.tolist()) == ([[3.0]], [True])


def test_a_chat_of_which_everything_is_trained_on_is_left_out(tmp_path):
    alone = [[f"ask {i}", f"answer number {i}"] for i in range(40)]
    training, evaluation = (asked(part) for part in halves(tmp_path, alone))
    trained, held = min(training), min(evaluation)
    # As a later turn of another chat.
    chats = [[ask, "Yes." if ask == held else answer] for ask, answer in alone]
    chats = [[*chat, "so?", "Yes."] if chat[0] == trained else chat for chat in chats]
    assert asked(halves(tmp_path, chats).evaluation) == evaluation - {held}
    # All of them: more text of that kind would not help, and the message says what would.
    with pytest.raises(
        sj.DataError, match=rf" and 0 to evaluate .* {len(evaluation)} that were held out .* recurs .* take rec"
    ):
        halves(tmp_path, [[ask, "Yes."] for ask, _ in alone])
    few = [chat for chat in alone if chat[0] in training]
    with pytest.raises(sj.DataError, match=r" and 0 to evaluate .* both sides need some\. Make more, or change"):
        halves(tmp_path, few)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is list"),
        ('{"text": "a"}', r"has the keys \['text'\]"),
        ('{"messages": []}', "at least one turn"),
        ('{"messages": ["hi"]}', "turn 0 has role None"),
        ('{"messages": [{"role": "critic", "content": "x"}]}', "role 'critic'"),
        ('{"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]}', "weight 0.5; expected 0"),
        ('{"messages": [{"role": "assistant", "content": "", "tool_calls": []}]}', "content ''; expected a text"),
        ('{"messages": [{"role": "user", "content": "x"}], "system": 3}', "system 3; expected a text"),
        ('{"messages": [{"role": "system", "content": "x"}], "system": "y"}', "two system prompts"),
        ('{"messages": [{"role": "user", "content": "x"}], "tools": "["}', "tools that are no JSON"),
        ('{"messages": [{"role": "user", "content": "x"}], "tools": {"a": 1}}', "expected a list of descriptions"),
        ('{"conversations": [{"from": "human", "value": " "}]}', "value ' '"),
        ('{"messages": [{"role": "user", "content": [1]}]}', r"content \[1\]"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no assistant turn"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "begins with the assistant"),
    ],
)
def test_malformed_lines_are_named(tmp_path, line, message):
    file = tmp_path / "c.jsonl"
    file.write_text(json.dumps({"messages": CHAT}) + "\n" + line + "\n")
    with pytest.raises(sj.DataError, match=rf"c\.jsonl:2.*{message}"):
        read_conversations(file, byte_tokenizer(CHATML, ("<|s|>", "<|e|>"), eos="<|e|>"), max_tokens=500)


WITH_TOOLS = CHATML.replace("m['content']", "(m['content'] or '') + ((m['tool_calls'] or '') | string)").replace(
    "{% for m", "{% if tools %}{{ tools[0].name }}{% endif %}{% for m", 1
)


def test_what_a_line_says_beside_its_texts(tmp_path):
    """The template gets it; what it does not write is counted."""
    file, lines = tmp_path / "c.jsonl", []
    called = {"role": "assistant", "content": None, "tool_calls": ["f"], "reasoning_content": "hm"}
    chat = [{"role": "user", "content": "hi"}, called, {"role": "tool", "content": "3"}, CHAT[2]]
    record = {"system": "Be brief.", "messages": chat, "tools": [{"name": "look"}], "id": 7}
    file.write_text("\n".join(map(json.dumps, (record, {**record, "tools": json.dumps(record["tools"])}))))
    special = ("<|s|>", "<|e|>")
    full = byte_tokenizer(WITH_TOOLS, special, eos="<|e|>")
    first, second = read_conversations(file, full, max_tokens=500, report=lines.append)
    np.testing.assert_array_equal(first.answer, second.answer)
    text = full.decode(first.prompt, skip_special_tokens=False)
    assert text == "look<|s|>system\nBe brief.<|e|>\n<|s|>user\nhi<|e|>\n<|s|>assistant\n"
    assert full.decode(first.answer).startswith("['f']")
    assert lines == [
        f"{file}: 2 turns have 'reasoning_content', which the chat template does not write: it is left out"
    ]
    lines.clear()
    plain = byte_tokenizer(CHATML.replace("m['content']", "(m['content'] or '')"), special, eos="<|e|>")
    read_conversations(file, plain, max_tokens=500, report=lines.append)
    told = [line.removeprefix(f"{file}: ").partition(",")[0] for line in lines]
    assert told == ["2 turns have 'reasoning_content'", "2 turns have 'tool_calls'", "2 chats have 'tools'"]
    lines.clear()
    assert read_prompts(file, lines.append) == [[{"role": "system", "content": "Be brief."}, chat[0]]]
    assert lines == [f"{file}: 2 chats have tools, which are left out of their prompts"]


@pytest.mark.parametrize("template", [CHATML, BLOCKS])
def test_a_turn_of_no_weight_is_not_learned(tmp_path, template):
    tokenizer, file = byte_tokenizer(template, ("<|s|>", "<|e|>"), eos="<|e|>"), tmp_path / "c.jsonl"
    for weights, spoken in (((0, 1), "no<|e|>"), ((1, 0), "Hé, you<|e|>"), ((1, 1), "Hé, you<|e|>no<|e|>")):
        told = iter(weights)
        chat = [m | {"weight": next(told)} if m["role"] == "assistant" else m for m in CHAT]
        file.write_text(json.dumps({"messages": chat}))
        (item,) = read_conversations(file, tokenizer, max_tokens=500)
        assert tokenizer.decode(item.answer[item.mask], skip_special_tokens=False) == spoken
    file.write_text(json.dumps({"messages": [m | {"weight": 0} for m in CHAT]}))
    with pytest.raises(sj.DataError, match="no chat in"):
        read_conversations(file, tokenizer, max_tokens=500)


def test_files_that_hold_nothing(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    for name, message in (("empty", "is empty"), ("binary", "cannot be read"), ("none", "cannot be read")):
        for read in (read_chats, read_prompts):
            with pytest.raises(sj.DataError, match=rf"{name}\.jsonl {message}"):
                read(tmp_path / f"{name}.jsonl")


def test_prompts_from_every_format(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"question_id": 1, "category": "c", "turns": ["a", "b"]}\n' * 2)
    assert read_prompts(file) == [[{"role": "user", "content": "a"}]]  # each once
    file.write_text(json.dumps(sharegpt(CHAT)))
    assert read_prompts(file) == [CHAT[:2]]
    file.write_text(json.dumps(sharegpt(CHAT[2:])))
    with pytest.raises(sj.DataError, match=r"p\.jsonl:1 has no user turn before the first answer"):
        read_prompts(file)
