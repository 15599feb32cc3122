"""Self-replay of instruct models: conversations through the template, against a plain loop; what begins and what ends a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import BY_NAME, make
from replay_samples import DOCS, chat_tokenizer, interrupted_replay, replay_options

from hf_grow.cli import main
from hf_grow.errors import InputError
from hf_grow.options import parse
from hf_grow.training.data import DataOptions, build
from hf_grow.training.data.chat_template import parse_chat_template
from hf_grow.training.data.packing import DocumentEncoder
from hf_grow.training.data.replay import sample_replay
from hf_grow.training.data.replay_files import RECORD_FILE, TEXTS_FILE, Document
from hf_grow.training.data.sampling import Sampler, resolve_options

END, START, IM_START, IM_END = 0, 1, 2, 3
MORE_ENDS = tuple(range(100, 115))
"""So that a random model ends some turns, and not others."""


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer()


@pytest.fixture(scope="module")
def model():
    made = make(BY_NAME["llama"], vocab_size=300, bos_token_id=IM_START, eos_token_id=IM_END, dtype=torch.float64)
    made.set_attn_implementation("sdpa")  # eager attention makes NaN of filled positions in fp64
    made.generation_config.eos_token_id = [IM_END, *MORE_ENDS]
    return made


def plain_loop(model: Any, rows: list[list[int]], new: int, ends: set[int]) -> list[list[int]]:
    """Each row by itself, without padding or cache; the same random numbers for a step of all rows."""
    drawn: list[list[int]] = [[] for _ in rows]
    over = [False] * len(rows)
    for _ in range(new):
        with torch.no_grad():
            logits = torch.stack([model(torch.tensor([r + d]), use_cache=False).logits[0, -1] for r, d in zip(rows, drawn, strict=True)])
        tokens = torch.multinomial(logits.float().softmax(-1), 1)[:, 0].tolist()
        for n, token in enumerate(tokens):
            if not over[n]:
                drawn[n].append(token)
                over[n] = token in ends
            else:
                drawn[n].append(min(ends))
        if all(over):
            break
    return [d[: next((i for i, t in enumerate(d) if t in ends), len(d) - 1) + 1] for d in drawn]


def test_conversations_equal_plain_sampling_loop(model, tokenizer) -> None:
    length = 48
    sampler = Sampler(model, tokenizer, replay_options(max_length=length, chat_share=1.0))
    drawn = sampler.draw(3, 8, chat=True)
    ends = {END, IM_START, IM_END, *MORE_ENDS}
    before = tokenizer.encode("<|im_start|>user\n", add_special_tokens=False)
    between = tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)
    seed = int(np.random.SeedSequence([0, 3]).generate_state(1, np.uint64)[0] >> 1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        messages = plain_loop(model, [before] * 8, (length - len(before) - len(between)) // 2, ends)
        asked = [[*before, *m[:-1], *between] for m in messages if m[-1] in ends]
        answers = plain_loop(model, asked, length - min(map(len, asked)), ends)
    answers = [a[: length - len(q)] for q, a in zip(asked, answers, strict=True)]
    kinds, left = set(), iter(answers)
    for sample, message in zip(drawn, messages, strict=True):
        closed = message[-1] in ends
        answer = next(left) if closed else []
        whole = closed and answer[-1] in ends
        inside = [*before, *message[:-1], *between, *answer[: -1 if whole else None]] if closed else [*before, *message]
        assert list(sample.ids) == inside and len(inside) <= length
        assert (sample.frame, sample.cut) == ("verbatim", not whole)
        question = tokenizer.decode([i for i in message if i > IM_END and i not in ends])
        reply = tokenizer.decode([i for i in answer if i > IM_END and i not in ends])
        if whole:
            turns = [{"role": "user", "content": question.strip()}, {"role": "assistant", "content": reply.strip()}]
            assert sample.text == tokenizer.apply_chat_template(turns, tokenize=False)
        else:
            assert not sample.text.endswith(("<|im_end|>", "<|im_end|>\n"))
        kinds.add((closed, whole))
    assert kinds == {(True, True), (True, False), (False, False)}


def test_chat_model_detection_and_document_start(model, tokenizer) -> None:
    """A template alone says little: base models have one. BOS that opens a turn begins no document."""
    assert resolve_options(model, tokenizer, replay_options()).chat_share == 0.5
    assert {s.ids[0] for s in Sampler(model, tokenizer, replay_options()).draw(0, 4)} == {END}
    base = chat_tokenizer(bos_token="<s>", eos_token="<|endoftext|>")
    own, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    try:
        assert resolve_options(model, base, replay_options()).chat_share == 0
        assert {s.ids[0] for s in Sampler(model, base, replay_options()).draw(0, 4)} == {START}
        model.generation_config.eos_token_id = [IM_END]
        assert resolve_options(model, base, replay_options()).chat_share == 0.5  # the checkpoint's own ends count too
    finally:
        model.generation_config.eos_token_id = own
    assert resolve_options(model, chat_tokenizer(chat_template=None), replay_options()).chat_share == 0


def test_no_document_start_token_fails(model, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_grow.training.data.chat_template.DOCUMENT_TOKENS", ())
    with pytest.raises(InputError, match=r"(?s)tokens of its chat template.*--start random.*--chat-share 1"):
        Sampler(model, tokenizer, replay_options())
    Sampler(model, tokenizer, replay_options(chat_share=1.0))
    drawn = Sampler(model, tokenizer, replay_options(start="random")).draw(0, 8)
    assert all(s.ids[0] > IM_END for s in drawn) and len({s.ids[0] for s in drawn}) > 4


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}{{ '[INST]' + m['content'] + '[/INST]' if loop.first else m['content'] + '<|im_end|>' }}{% endfor %}",
            "with plain text",
        ),
        ("{{ raise_exception('tools only') }}", "cannot be used: tools only"),
        ("{{ messages[0]['content'] }}", "one message and one answer"),
    ],
)
def test_unusable_chat_templates_fail(model, template: str, message: str) -> None:
    odd = chat_tokenizer(chat_template=template)
    with pytest.raises(InputError, match=rf"(?s){message}.*--chat-share 0"):
        Sampler(model, odd, replay_options())
    assert Sampler(model, odd, replay_options(chat_share=0.0, start="random")).kinds == [False]
    with pytest.raises(InputError, match="no chat template"):
        Sampler(model, chat_tokenizer(chat_template=None), replay_options(chat_share=0.5))
    with pytest.raises(InputError, match="too short for a conversation"):
        Sampler(model, chat_tokenizer(), replay_options(chat_share=1.0, max_length=8)).draw(0, 2, chat=True)


def test_chat_share_and_resumed_sampling(model, tokenizer, tmp_path: Path) -> None:
    wanted = replay_options(tokens=1500, max_length=48, batch_size=4, max_surprise=20.0)
    whole = sample_replay(model, tokenizer, tmp_path / "whole", wanted)
    counts = whole.record["counts"]
    assert abs(counts["chat_tokens"] - counts["tokens"] / 2) <= 4 * 48
    assert set(whole.record["surprise"]) == {"plain", "chat"}
    interrupted_replay(model, tokenizer, tmp_path / "again", 3, wanted)
    sample_replay(model, tokenizer, tmp_path / "again", wanted)
    for name in (TEXTS_FILE, RECORD_FILE):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_sampled_texts_are_packed_by_their_frame(model, tokenizer, tmp_path: Path) -> None:
    """EOS after whole documents only; a conversation has its template's tokens and no others."""
    out = tmp_path / "old"
    sample_replay(model, tokenizer, out, replay_options(tokens=1500, max_length=48, batch_size=8))
    lines = [json.loads(line) for line in (out / TEXTS_FILE).read_text().splitlines()]
    assert {line["frame"] for line in lines} == {"document", "cut", "verbatim"}
    expected = [
        i for line in lines
        for i in [*tokenizer.encode(line["text"], add_special_tokens=False), *[IM_END] * (line["frame"] == "document")]
    ]  # fmt: skip
    new = tmp_path / "new.txt"
    new.write_text(DOCS[0] * 40)
    wanted = {"train": str(new), "replay": {"path": str(out), "share": 0.5}, "seq_length": 16, "shuffle": False}
    data = build(parse(DataOptions, wanted, where="test"), tokenizer, cache=tmp_path / "cache")
    rows = len(expected) // 16
    assert data.parts[0].sequences == rows and data.parts[0].passes >= 1
    own = {tuple(expected[n * 16 : n * 16 + 16]) for n in range(rows)}
    assert own <= {tuple(r) for r in data.train["input_ids"]}
    (out / TEXTS_FILE).write_text('{"text": "a", "frame": "round"}\n')
    with pytest.raises(InputError, match="is not a sampled text"):
        build(parse(DataOptions, wanted, where="test"), tokenizer, cache=tmp_path / "cache")


def test_frames_with_tokenizer_that_adds_special_tokens(tokenizer) -> None:
    from tokenizers.processors import TemplateProcessing

    framing = chat_tokenizer(bos_token="<s>", eos_token="<|im_end|>")
    framing.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A <|im_end|>", special_tokens=[("<s>", START), ("<|im_end|>", IM_END)]
    )
    bare = framing.encode("import os", add_special_tokens=False)
    texts = [Document("import os", frame) for frame in ("cut", "document", "verbatim", "cut")]
    found = DocumentEncoder(framing, "tokenizer")(["import os", *texts])
    assert found == [[START, *bare, IM_END], [START, *bare], [START, *bare, IM_END], bare, [START, *bare]]
    assert DocumentEncoder(framing, "never")(texts) == [bare, [*bare, IM_END], bare, bare]


def test_self_replay_max_length_defaults_to_seq_length(model, tokenizer, tmp_path: Path) -> None:
    folder, new = tmp_path / "model", tmp_path / "new.txt"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    new.write_text(DOCS[0])
    wanted = {"train": str(new), "seq_length": 56, "replay": {"share": 0.5, "self": {"model": str(folder), "tokens": 300, "batch_size": 4}}}
    data = build(parse(DataOptions, wanted, where="test"), tokenizer, cache=tmp_path / "cache")
    record = json.loads((Path(data.parts[0].label) / RECORD_FILE).read_text())
    assert record["settings"]["max_length"] == 56
    assert resolve_options(model, tokenizer, replay_options(max_length=10**6)).max_length == model.config.max_position_embeddings


def test_replay_command_reports_chat_share(model, tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = ["--tokens", "300", "--max-length", "48", "--batch-size", "4", "--chat-share", "0.5", "--device", "cpu"]
    assert main(["replay", str(tmp_path / "model"), "-o", str(tmp_path / "out"), *words]) == 0
    counts = json.loads((tmp_path / "out" / RECORD_FILE).read_text())["counts"]
    assert counts["chat_tokens"]
    assert f"chats      {counts['chat_tokens']} of {counts['tokens']} tokens are conversations" in capsys.readouterr().out


def test_parse_chat_template(tokenizer) -> None:
    template = parse_chat_template(tokenizer)
    assert template is not None
    assert (template.before, template.between, template.after) == (
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>\n",
    )
    assert (template.turn_tokens, template.user_end, template.answer_end) == ({IM_START, IM_END}, IM_END, IM_END)
