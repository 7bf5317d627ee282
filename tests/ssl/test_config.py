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
        ("crops.global_scale={a: 1}", ["crops.global_scale", "list"]),
        ("crops.local_scale={a: 1}", ["crops.local_scale", "list"]),
        ("augment.blur={a: 1}", ["augment.blur", "list"]),
        ("objective.teacher_temperature={a: 1}", ["objective.teacher_temperature", "list"]),
        ("objective.momentum={a: 1}", ["objective.momentum", "list"]),
        ("optim.weight_decay={a: 1}", ["optim.weight_decay", "list"]),
        ("objective.teacher_temperature=[0.0,0.07]", ["objective.teacher_temperature", "0.0"]),
        ("objective.teacher_temperature=[0.04]", ["objective.teacher_temperature", "2"]),
        ("objective.student_temperature=1e-9", ["objective.student_temperature", "0.001"]),
        ("objective.momentum=[0.9,1.1]", ["objective.momentum", "1.1", "1"]),
        ("optim.weight_decay=[-0.1,0.4]", ["optim.weight_decay", "-0.1", "0"]),
        ("optim.weight_decay=[0.1,.inf]", ["optim.weight_decay", "inf", "finite"]),
        (f"run.steps={10**30}", ["run.steps", "1099511627776"]),
        (f"objective.teacher_temperature_warmup={10**30}", ["teacher_temperature_warmup", "1099511627776"]),
        ("crops.global_size=16000", ["crops.global_size", "16000", "8192"]),
        ("augment.contrast=11", ["augment.contrast", "11", "10"]),
        ("optim.lr=1e9", ["optim.lr", "1000"]),
        ("optim.clip=1e9", ["optim.clip", "1000"]),
        ("augment.mean=[123.7,116.3,103.5]", ["augment.mean", "123.7", "1"]),
        ("crops.local_scale=[1e-9,0.5]", ["crops.local_scale", "1e-09", "1e-06"]),
        ("crops.aspect=[0.001,1.0]", ["crops.aspect", "0.001", "0.01"]),
        ("crops.aspect=[1.0,1000.0]", ["crops.aspect", "1000.0", "100"]),
        ("augment.blur_sigma=[1e-4,1.0]", ["augment.blur_sigma", "0.0001", "0.01"]),
        ("data.clusters=x", ["data.clusters", "data.balance"]),
        ("data.balance=[cluster]", ["data.balance", "data.clusters=NAME"]),
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


NO_SHARDS = ["{he: .nan}", "{he: nan}", "{he: 0}", "{he: -1}", "{he: [1]}", "{he: true}", "{}", "''", "[a]", "1.5e3"]


@pytest.mark.parametrize("given", NO_SHARDS)
@pytest.mark.parametrize("key", ["data.shards", "high_resolution.shards"])
def test_what_is_no_share_or_path_says_what_is(tmp_path, given, key):
    section, name = key.split(".")
    (tmp_path / "a.yaml").write_text(f"base: uni\n{section}: {{{name}: {given}}}\n")
    with pytest.raises(UserError, match=rf"{key}: give a folder or URL, or {{PATH: SHARE above 0, \.\.\.}}$"):
        load_config(str(tmp_path / "a.yaml"), ["run.dir=r", *([] if section == "data" else ["data.shards=s"])])


def test_no_shard_set_at_all_says_what_one_is():
    assert complaint("data.shards=").endswith("data.shards: give a folder or URL, or {PATH: SHARE above 0, ...}")


@pytest.mark.parametrize(
    ("recipe", "override", "expected"),
    [
        ("data: {shards: {A: 1, B: 1}}", "data.shards={C: 1}", {"C": 1}),
        ("data: {shards: {A: 1, B: 1}}", "data={shards: {C: 1}}", {"C": 1}),
        ("data: {shards: {A: 1, B: 1}}", "data.shards=C", "C"),
        ("data: {shards: {A: 1, B: 1}}", "data.batch=7", {"A": 1, "B": 1}),
        ("data: {shards: {A: 1, B: 1}}", "data.shards.B=2", {"A": 1, "B": 2}),
    ],
)
def test_shard_sets_are_replaced_and_not_mixed_with_those_of_the_recipe(tmp_path, recipe, override, expected):
    (tmp_path / "a.yaml").write_text(recipe)
    assert load_config(str(tmp_path / "a.yaml"), ["run.dir=r", override]).data.shards == expected


def test_shard_sets_replace_those_of_the_base(tmp_path):
    last = "high_resolution: {{steps: 5, crops: {{}}, shards: {{{0}: 1}}}}"
    (tmp_path / "a.yaml").write_text("data: {shards: {A: 1, B: 1}, batch: 7}\n" + last.format("D"))
    (tmp_path / "b.yaml").write_text("base: a\ndata: {shards: {C: 1}}\n" + last.format("E"))
    config = load_config(str(tmp_path / "b.yaml"), ["run.dir=r"])
    assert (config.data.shards, config.data.batch) == ({"C": 1}, 7)
    assert config.high_resolution.shards == {"E": 1}
    config = load_config(str(tmp_path / "b.yaml"), ["run.dir=r", "high_resolution.shards={F: 2}"])
    assert config.high_resolution.shards == {"F": 2}


@pytest.mark.parametrize("name", ["2024", "2024_01", "007", "1e3", "12.50"])
def test_a_folder_whose_name_is_a_number_is_a_folder(name):
    given = [f"data.shards={name}", f"run.dir={name}", f"model.init_from={name}"]
    config = load_config("small", given)
    assert (config.data.shards, config.run.dir, config.model.init_from) == (name, name, name)


def test_a_number_is_a_folder_in_a_recipe_and_among_several(tmp_path):
    (tmp_path / "a.yaml").write_text("data: {shards: {2024: 1, b: 2}}\nrun: {dir: 2025}\nmodel: {init_from: 2026}\n")
    config = load_config(str(tmp_path / "a.yaml"), [])
    assert config.data.shards == {"2024": 1, "b": 2}
    assert (config.run.dir, config.model.init_from) == ("2025", "2026")


@pytest.mark.parametrize(
    "override",
    [
        "data.shards={'http://user:s3cret@host/x': 0}",
        "data.shards={'http://host/x?X-Amz-Signature=s3cret': none}",
        "data.shards=['http://user:s3cret@host/x']",
        "data.shards={'http://user:s3cret@host/x': {a: b}}",
        "high_resolution={steps: 1, crops: {}, shards: {'http://user:s3cret@host/x': 0}}",
        "health.probe={shards: ['http://user:s3cret@host/x']}",
        "health.probe={shards: [s3cret]}",
        "data=['http://user:s3cret@host/x']",
        "data.shards={http://user:s3cret@host/x",
        "http://user:s3cret@host/x",
    ],
)
def test_the_password_in_a_url_is_not_shown(override):
    assert "s3cret" not in complaint(override)


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


@pytest.mark.parametrize(
    "shards", ["http://me:s3cret@host/x?X-Amz-Signature=s3cret", "{'https://me:s3cret@host/x': 2, plain: 1}"]
)
def test_a_run_keeps_no_credentials(tmp_path, shards):
    config = load_config("smoke", [f"data.shards={shards}", f"run.dir={tmp_path}"])
    write_config(tmp_path / "config.yaml", config)
    text = (tmp_path / "config.yaml").read_text()
    assert "host/x" in text
    assert "s3cret" not in text
    kept = read_run_config(tmp_path)
    assert kept.model_copy(update={"data": config.data}) == config
