"""Plants bugs that public versions have, one at a time in a copy, and shows the test that fails.

    python tests/plant.py

Prints a Markdown table. A bug that no longer fits the code, or that its test misses, is an error.
"""
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUGS = [  # what is wrong, the line to change, what to make of it, the test that fails
    ("Partial LoRA's B is never set to zero", "plora.py",
     "nn.init.zeros_(self.lora_B)", "nn.init.normal_(self.lora_B)",
     "test_plora.py::test_a_fresh_adapter_changes_nothing_and_yet_gets_a_gradient"),
    ("A parameter stays uninitialised memory", "model.py",
     "            nn.init.normal_(parameter, std=0.3)", "            pass",
     "test_model.py::test_a_fresh_model_leaves_no_parameter_uninitialised"),
    ("A branch on the mask waits for the device and breaks graph capture", "plora.py",
     "        if is_image.shape != x.shape[:-1]:", "        if is_image.sum() < 0:",
     "test_plora.py::test_it_is_captured_whole_and_one_graph_serves_any_share_of_image_rows"),
    ("Dropout and drop path in frozen parts", "model.py",
     "                module.eval()", "                pass",
     "test_model.py::test_frozen_modules_stay_in_eval_mode_until_they_are_trainable_again"),
    ("A projector that ignores its normalisation", "model.py",
     "    if normalization:", "    if False:",
     "test_model.py::test_projector_equals_its_linears_with_activations_between_them_and_a_norm"
     "_behind"),
    ("Cached decoding adapts new text tokens", "model.py",
     "self.adapted(tokens[:, None] == c.image_id, has_images=False)",
     "torch.ones_like(tokens[:, None], dtype=torch.bool)",
     "test_model.py::test_generation_with_a_cache_equals_the_full_forward"),
    ("Generation ends when the first row has", "model.py",
     "is_stopped.all()", "is_stopped[0]",
     "test_model.py::test_a_row_that_has_stopped_yields_stop_id_until_all_have_stopped"),
    ("Queries attend to text under ITG", "qformer.py",
     "        mask[n_queries:, :n_queries] = True  # text attends to every query\n",
     "        mask[n_queries:, :n_queries] = mask[:n_queries, n_queries:] = True\n",
     "test_qformer.py::test_mask_equals_the_one_written_by_hand"),
    ("Text positions off by the number of queries", "qformer.py",
     "self.position_embedding.weight[:T]",
     "self.position_embedding.weight[self.n_queries:self.n_queries + T]",
     "test_qformer.py::test_text_positions_start_at_0_with_or_without_queries"),
    ("ITC multiplied by its temperature", "qformer.py",
     "cosine.float() / self", "cosine.float() * self",
     "test_qformer.py::test_similarity_is_the_best_cosine_divided_by_the_temperature"),
    ("A sample whose answer is cut off trains on nothing", "data.py",
     "set(labels[:max_len]) != {IGNORED}", "True",
     "test_data.py::test_what_is_too_long_is_cut_at_the_end_or_raises"),
    ("Scenes are drawn from a global generator: measuring changes the training data", "data.py",
     'rng = random.Random(f"{self.seed} {self.split} {i}")', "rng = random",
     "test_data.py::test_the_same_number_gives_the_same_picture_and_text"),
    ("Frozen parameters reach the optimizer and its weight decay", "train.py",
     "        if not parameter.requires_grad:\n", "        if False:\n",
     "test_train.py::test_optimizers_have_no_frozen_parameter_and_one_group_for_each_rate_and"
     "_decay"),
    ("A resumed run starts its data anew", "train.py",
     "task.batches(stage, collate, first_step=len(losses))", "task.batches(stage, collate)",
     "test_train.py::test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit"),
]


def main() -> None:
    print("| bug | file | the test that fails |", "| --- | --- | --- |", sep="\n")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "copy")
        shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns("out*", ".*", "__pycache__"))
        for bug, name, line, wrong, test in BUGS:
            intact = (root / name).read_text()
            if intact.count(line) != 1:
                sys.exit(f"plant.py: {name} has {intact.count(line)} times {line!r}")
            (root / name).write_text(intact.replace(line, wrong))
            command = [sys.executable, "-m", "pytest", "-q", "-x", f"tests/{test}"]
            if subprocess.run(command, cwd=root, capture_output=True).returncode != 1:
                sys.exit(f"plant.py: not caught by {test}: {bug}")
            (root / name).write_text(intact)
            print(f"| {bug} | {name} | `{test.split('::')[1]}` |", flush=True)


if __name__ == "__main__":
    main()
