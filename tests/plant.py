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
BUGS = [  # what is wrong, the file, what to change there, into what, the test that fails
    ("Partial LoRA's B is never set to zero", "plora",
     "nn.init.zeros_(self.lora_B)", "nn.init.normal_(self.lora_B)",
     "test_a_fresh_adapter_changes_nothing_and_yet_gets_a_gradient"),
    ("A parameter stays uninitialized memory", "model",
     "            nn.init.normal_(parameter, std=0.3)", "            pass",
     "test_a_fresh_model_leaves_no_parameter_uninitialized"),
    ("A branch on the mask waits for the device and breaks graph capture", "plora",
     "        if is_image.shape != x.shape[:-1]:", "        if is_image.sum() < 0:",
     "test_it_is_captured_whole_and_one_graph_serves_any_share_of_image_tokens"),
    ("Dropout and drop path in frozen parts", "model",
     "                module.eval()", "                pass",
     "test_frozen_modules_stay_in_eval_mode_until_they_are_trainable_again"),
    ("A projector that ignores its normalization", "model", "if normalization:", "if False:",
     "test_projector_equals_its_linears_with_activations_between_them_and_a_norm_behind"),
    ("Dropout of adapters is ignored", "model", "dropout=lora_dropout", "dropout=0.0",
     "test_frozen_modules_stay_in_eval_mode_until_they_are_trainable_again"),
    ("Cached decoding adapts new text tokens", "model", "is_adapted, positions, used",
     "positions >= 0, positions, used", "test_generation_with_a_cache_equals_the_full_forward"),
    ("Generation ends when the first text has", "model", "is_stopped.all()", "is_stopped[0]",
     "test_a_text_that_has_stopped_yields_stop_id_until_all_have_stopped"),
    ("Queries attend to text under ITG", "qformer",
     "[n_queries:, :n_queries] =", "[n_queries:, :n_queries] = mask[:n_queries, n_queries:] =",
     "test_mask_equals_the_one_written_by_hand"),
    ("Text positions off by the number of queries", "qformer",
     "weight[:text.shape[1]]", "weight[self.n_queries:self.n_queries + text.shape[1]]",
     "test_text_positions_start_at_0_with_or_without_queries"),
    ("ITC multiplied by its temperature", "qformer", "amax(dim=-1) / self", "amax(dim=-1) * self",
     "test_similarity_is_the_best_cosine_divided_by_the_temperature_also_under_autocast"),
    ("The end of an answer is ignored like padding: no answer ever ends", "data",
     "tokens if is_trained else", "tokens[:-1] + [IGNORED] if is_trained else",
     "test_ids_and_labels_equal_those_worked_by_hand_and_no_text_fakes_a_mark"),
    ("Scenes are drawn from a global generator: measuring changes the training data", "data",
     'rng = random.Random(f"{self.seed} {self.split} {i}")', "rng = random",
     "test_the_same_number_gives_the_same_picture_and_text"),
    ("Test scenes trained on", "train", '"question", n, "test"', '"question", n, "train"',
     "test_scenes_to_ask_about_are_none_to_train_on_and_one_metric_is_of_unseen_pairs"),
    ("Frozen parameters reach the optimizer", "train",
     "        if not parameter.requires_grad:\n", "        if False:\n",
     "test_optimizers_have_no_frozen_parameter_no_decay_and_one_group_for_each_rate"),
    ("The learning rate follows no schedule", "train", "= schedule(step, steps)", "= 1.0",
     "test_a_step_is_as_long_as_the_schedule_says_however_steep_the_loss"),
    ("A resumed run starts its data anew", "train", "collate, first_step=len(losses))", "collate)",
     "test_a_resumed_run_equals_a_whole_one_to_the_bit"),
    ("Dropout while it is measured", "sample", "    model.eval()\n    metrics", "    metrics",
     "test_right_blind_and_floor_equal_those_worked_by_hand_and_classes_count_to_the_sign"),
    ("The blind answer sees its own picture", "sample", "replace(sample, images=images)", "sample",
     "test_blind_shows_each_question_another_picture_or_none_if_all_are_alike"),
]


def main():
    pytest = [sys.executable, "-m", "pytest", "-q", "-x"]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "copy")
        shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns("out*", ".*", "__pycache__"))
        tests = [f"tests/test_{name}.py::{test}" for _, name, *_, test in BUGS]
        if subprocess.run([*pytest, *tests], cwd=root, capture_output=True).returncode != 0:
            sys.exit("plant.py: one of the tests fails without any bug")
        print("| bug | file | the test that fails |", "| --- | --- | --- |", sep="\n", flush=True)
        for (bug, name, line, wrong, _), test in zip(BUGS, tests):
            file = root / f"{name}.py"
            intact = file.read_text(encoding="utf-8")
            if intact.count(line) != 1:
                sys.exit(f"plant.py: {name}.py has {intact.count(line)} times {line!r}")
            file.write_text(intact.replace(line, wrong), encoding="utf-8")
            if subprocess.run([*pytest, test], cwd=root, capture_output=True).returncode != 1:
                sys.exit(f"plant.py: not caught by {test}: {bug}")
            file.write_text(intact, encoding="utf-8")
            print(f"| {bug} | {name}.py | `{test.split('::')[1]}` |", flush=True)


if __name__ == "__main__":
    main()
