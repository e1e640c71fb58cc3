"""What the tests share: the project's files made importable, and folders that are written once.

One thread: on tiny tensors several only wait for each other."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def untrained(tmp_path_factory):
    """A folder with checkpoints, images and data files. Tests only add to it."""
    import tiny
    folder = tmp_path_factory.mktemp("place")
    tiny.make_model(folder / "model")
    tiny.make_model(folder / "other", seed=1)
    tiny.make_model(folder / "tied", tie_word_embeddings=True)
    tiny.make_model(folder / "tiled", tiles=True)
    tiny.make_images(folder / "images")
    for name, records in {
            "rows": tiny.MIXED, "pairs": tiny.PAIRS, "ranked": tiny.RANKED, "margins": tiny.MARGINS,
            "text": [tiny.MIXED[i] for i in (1, 7, 3, 5)],  # the short ones are text
            "all_text": [tiny.MIXED[i] for i in (1, 7, 4, 1)]}.items():
        tiny.write_rows(folder / f"{name}.json", records)
    return folder


@pytest.fixture(scope="session")
def trained(untrained, tmp_path_factory):
    """The same with a policy that ends most answers by itself, reward models and one-turn records."""
    import tiny
    folder = tmp_path_factory.mktemp("trained")
    (folder / "images").symlink_to(untrained / "images")
    tiny.write_rows(folder / "rows.json", tiny.ONE_TURN)
    tiny.write_rows(folder / "turns.json", tiny.MIXED)
    done = tiny.fork("sft", "--model", untrained / "model", "--data", folder / "rows.json", "--images",
                     folder / "images", "--out", folder / "model", "--batch_size", 10, "--micro_batch", 10,
                     "--max_steps", 35, "--lr", "1e-2", "--workers", 0)
    assert done.code == 0, done.err
    tiny.make_reward_model(folder / "reward", folder / "model")
    tiny.make_reward_model(folder / "tower", folder / "model", tower=False)
    for name in ("llama2", "foreign"):
        tiny.shutil.copytree(folder / "reward", folder / name)
    tiny.shutil.copy(tiny.ROOT / "templates" / "llama2.jinja", folder / "llama2" / "chat_template.jinja")
    tiny.swap_tokens(folder / "foreign")
    (folder / "rewards.py").write_text(tiny.REWARDS)
    return folder


@pytest.fixture(scope="session")
def place(untrained):
    """The folder that a test file starts from; another one says so itself."""
    return untrained


@pytest.fixture(scope="module")
def world():
    """This process as a world of one."""
    import tiny
    import torch.distributed as dist

    import fsdp
    world = fsdp.launch(tiny.options())
    tiny.unwatch()
    yield world
    dist.destroy_process_group()
