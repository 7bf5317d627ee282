import pytest

from eosin.data_tools.errors import UserError
from eosin.ssl.config import load_config, read_run_config, write_config

GIVEN = ["data.shards=s", "run.dir=r"]


def complaint(*overrides, recipe="demo"):
    with pytest.raises(UserError) as error:
        load_config(recipe, [*GIVEN, *overrides])
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optim.lrr=1", ["optim.lrr", "did you mean 'lr'"]),
        ("optm.lr=1", ["optm", "did you mean 'optim'"]),
        ("optim.lr=fast", ["optim.lr", "'fast'", "number"]),
        ("run.steps=3.5", ["run.steps", "3.5", "integer"]),
        ("run.steps=0", ["run.steps", "0", "1"]),
        ("optim=3", ["optim", "3"]),
        ("crops.local_size=50", ["crops.local_size", "50", "patch size 16", "48, 64"]),
        ("crops.global_scale=[0.9,0.2]", ["crops.global_scale", "0.9", "0.2"]),
        ("model.architecture=resnet50", ["model.architecture", "resnet50"]),
        ("stain.normalize=slides", ["stain.normalize", "'slides'", "'slide'"]),
        ("optim.warmup=301", ["optim.warmup", "300"]),
        ("augment.gray=1.5", ["augment.gray", "1.5"]),
        ("optim.lr", ["optim.lr", "key.sub=value"]),
        ("health.probe={shards: s, lable: x}", ["health.probe.lable", "did you mean 'label'"]),
    ],
)
def test_each_mistake_names_key_given_and_valid(override, parts):
    said = complaint(override)
    for part in parts:
        assert part in said


def test_missing_required_keys_are_asked_for():
    with pytest.raises(UserError, match=r"data\.shards is not set"):
        load_config("demo", [])


def test_unknown_recipe_names_a_near_one():
    assert "did you mean 'dinov2'" in complaint(recipe="dinov3")


def test_base_is_merged_under_and_overrides_over(tmp_path):
    (tmp_path / "a.yaml").write_text("optim: {lr: 4e-3, clip: 1.0}\nrun: {steps: 10}\n")
    (tmp_path / "b.yaml").write_text("base: a\noptim: {clip: 2.0}\n")
    config = load_config(str(tmp_path / "b.yaml"), [*GIVEN, "run.steps=20"])
    assert (config.optim.lr, config.optim.clip, config.run.steps) == (0.004, 2.0, 20)


def test_a_base_circle_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b\n")
    (tmp_path / "b.yaml").write_text("base: a\n")
    assert "circle" in complaint(recipe=str(tmp_path / "a.yaml"))


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "{}: {}"])
def test_broken_yaml_is_one_line(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    assert "a.yaml" in complaint(recipe=str(tmp_path / "a.yaml"))


def test_the_resolved_configuration_reads_back(tmp_path):
    config = load_config("small", [*GIVEN, "stain.normalize=off", "run.seed=7"])
    (tmp_path / "run").mkdir()
    write_config(tmp_path / "run" / "config.yaml", config)
    assert read_run_config(tmp_path / "run") == config


def test_dinov2_has_the_published_figures():
    config = load_config("dinov2", GIVEN)
    assert (config.data.batch, config.run.steps, config.optim.lr, config.optim.warmup) == (2048, 125_000, 4e-3, 12_500)
    assert (config.optim.weight_decay, config.objective.momentum) == ([0.04, 0.4], [0.992, 1.0])
    assert (config.objective.prototypes, config.objective.bottleneck, config.objective.koleo) == (65536, 256, 0.1)
    assert (config.model.drop_path, config.optim.layer_decay, config.optim.patch_embed_lr) == (0.3, 0.9, 0.2)
