"""Whole recipes: packaged ones, presets, overrides, round trips, arithmetic in words."""

from dataclasses import replace

import pytest

from gruppo.objective import PLANNED, PRESETS, Constant, DrGrpo, KLInReward, Reweight, Rloo
from gruppo.recipe import Recipe, RecipeError, from_table, load, packaged
from gruppo.recipe.describe import describe
from gruppo.recipe.dump import dump
from gruppo.recipe.source import parse
from gruppo.reward import Function, Number, SoftOverlong

MINIMAL = """
[model]
name = "some/model"
[[data.train]]
kind = "jsonl"
path = "train.jsonl"
[[reward.parts]]
name = "right"
kind = "number"
"""

OWN_TASK = """
[[reward.parts]]
name = "own"
kind = "my.module:score"
[reward]
task = "own"
"""

PUBLISHED = {
    # recipe: prompts, group, mini-batches, tokens, learning rate (papers named in the recipes)
    "deepseekmath": (16, 64, 1, 1024, 1e-6),
    "r1_zero": (512, 16, 16, 32768, 3e-6),
    "dapo": (512, 16, 16, 20480, 1e-6),
    "dr_grpo": (16, 8, 1, 3000, 1e-6),
    "intellect2": (256, 16, 8, 32768, 3e-7),
    "open_r1": (64, 16, 1, 1024, 2e-5),
    "open_r1_distill": (16, 16, 1, 2048, 1e-6),
    "r1_stage1": (512, 16, 16, 32768, 3e-6),
}


def recipe(*lines: str) -> Recipe:
    return from_table(parse("\n".join([MINIMAL, *lines])))


def mistakes(*lines: str) -> str:
    with pytest.raises(RecipeError) as caught:
        recipe(*lines)
    return str(caught.value)


@pytest.mark.parametrize("name", packaged())
def test_packaged_recipe_is_sound_and_survives_a_round_trip(name):
    loaded = load(name)
    assert from_table(parse(dump(loaded))) == loaded
    assert packaged()[name].startswith("# ")  # says what it is and where it comes from


@pytest.mark.parametrize("name", PUBLISHED)
def test_packaged_recipe_has_the_published_values(name):
    loaded = load(name)
    rollout = loaded.rollout
    assert PUBLISHED[name] == (
        rollout.prompts_per_step,
        rollout.group_size,
        loaded.train.minibatches,
        rollout.max_tokens,
        loaded.optim.lr,
    )


@pytest.mark.parametrize("name", PRESETS)
def test_preset_in_a_recipe_is_the_preset(name):
    loaded = recipe(OWN_TASK if name == "process" else "", f'[objective]\npreset = "{name}"')
    expected = PRESETS[name].objective
    built = loaded.objective.build(max_tokens=2048)
    if isinstance(expected.weights, Constant):
        expected = replace(expected, weights=Constant(length=2048))
    assert built == expected
    assert from_table(parse(dump(loaded))) == loaded


def test_default_objective_is_the_default_preset():
    assert recipe().objective.build(max_tokens=1) == PRESETS["default"].objective


def test_a_table_without_kind_changes_one_field_of_the_presets_part():
    loaded = recipe('[objective]\npreset = "dapo"', "[objective.surrogate]\neps_high = 0.4")
    assert (loaded.objective.surrogate.eps_low, loaded.objective.surrogate.eps_high) == (0.2, 0.4)


def test_another_kind_replaces_the_presets_part():
    loaded = recipe('[objective]\npreset = "dapo"\nsurrogate = "reinforce"\nweights = "constant"')
    built = loaded.objective.build(max_tokens=77)
    assert built.surrogate.kind == "reinforce"
    assert built.weights == Constant(length=77)


def test_none_takes_a_part_of_the_preset_away_also_after_a_round_trip():
    loaded = recipe('[objective]\npreset = "r1_zero"\nkl = "none"')
    assert loaded.objective.kl is None
    assert loaded.train.reference_sync_steps == 0  # the preset's 400 would move a reference unread
    assert from_table(parse(dump(loaded))) == loaded


def test_preset_settings_outside_the_objective_are_defaults_that_the_recipe_may_change():
    assert recipe('[objective]\npreset = "two_grpo"').rollout.group_size == 2
    assert recipe('[objective]\npreset = "dapo"').rollout.filter == "resample"
    changed = recipe('[objective]\npreset = "dapo"', '[rollout]\nfilter = "drop"')
    assert changed.rollout.filter == "drop"


@pytest.mark.parametrize(
    "changes",
    ["kl = {beta = 0.0}", 'kl = "none"', 'kl = {beta = 0.0}\ncredit = "rloo"'],
)
def test_a_presets_reference_refresh_gives_way_where_nobody_reads_the_reference(changes):
    loaded = recipe(f'[objective]\npreset = "r1_zero"\n{changes}')
    assert loaded.train.reference_sync_steps == 0
    assert from_table(parse(dump(loaded))) == loaded
    given = mistakes(
        f'[objective]\npreset = "r1_zero"\n{changes}', "[train]\nreference_sync_steps = 5"
    )
    assert "train.reference_sync_steps = 5: has no effect" in given


def test_a_presets_reference_refresh_stays_where_the_reference_is_read():
    for changes in (
        "kl = {beta = 0.5}",
        'kl = "none"\ncredit = {kind = "reinforce_pp", beta = 0.1}',
    ):
        loaded = recipe(f'[objective]\npreset = "r1_zero"\n{changes}')
        assert loaded.train.reference_sync_steps == 400


def test_a_presets_group_and_length_term_give_way_to_a_credit_that_cannot_take_them():
    four = 'credit = {kind = "passk_analytic", k = 4}'
    assert recipe(f'[objective]\npreset = "two_grpo"\n{four}').rollout.group_size == 8
    assert recipe('[objective]\npreset = "two_grpo"\ncredit = "rloo"').rollout.group_size == 2
    for credit, parts in (("gdpo", 1), ("maxrl", 1), ("dr_grpo", 2)):
        loaded = recipe(f'[objective]\npreset = "dapo"\ncredit = "{credit}"')
        assert len(loaded.reward.parts) == parts
        assert loaded.rollout.filter == "resample"


OVERLONG = '[[reward.parts]]\nname = "long"\nkind = "soft_overlong"\nbuffer = 9\n'
FUNCTION = '[[reward.parts]]\nname = "own"\nkind = "my.module:score"\n'
RAMP = "ramp = { to = -1.0, to_step = 9 }"
RISING = "weight = 0.0\nramp = { to = 1.0, to_step = 9 }\n"
FORMAT = '[[reward.parts]]\nname = "form"\nkind = "format"\n'
GATED = FORMAT + '[reward.parts.gate]\npart = "right"\n'


@pytest.mark.parametrize(
    ("preset", "text", "said"),
    [
        ("gdpo", OVERLONG, "reward.parts.long: has no effect"),
        ("process", OVERLONG, "reward.parts.long: has no effect"),
        ("gdpo", "[reward]\nclip_range = [0.0, 1.0]", "reward.clip_range = [0.0, 1.0]: has no"),
        ("gdpo", '[rollout]\ntruncation = "penalty"', 'rollout.truncation = "penalty": has no'),
        ("process", '[rollout]\ntruncation = "zero_reward"', "mask_after"),
        ("process", "", "reward.parts: right gives no process rewards"),
        ("process", FUNCTION, "reward.parts: right gives no process rewards"),
        ("process", FORMAT + '[reward]\ntask = "form"', "reward.task: form gives no process"),
        ("passk_analytic", OVERLONG, "reward.parts.long: is added to the task's reward and makes"),
        ("passk_analytic", FORMAT, "reward.parts.form: is added to the task's reward"),
        ("passk_analytic", "[[reward.parts]]\nweight = 2.0", "reward.parts.right.weight = 2.0"),
        ("passk_analytic", "[[reward.parts]]\nminimum = -0.5", "reward.parts.right.minimum = -0.5"),
        ("passk_analytic", '[rollout]\ntruncation = "penalty"', "truncation_penalty = -0.5"),
        ("passk_analytic", "[[reward.parts]]\n" + RAMP, "reward.parts.right.ramp = "),
        ("passk_analytic", "[[reward.parts]]\nclip = [0.0, 0.5]", "reward.parts.right.clip = "),
        ("passk_analytic", GATED + "otherwise = 0.5", "parts.form.gate.otherwise = 0.5: makes"),
        ("gdpo", OVERLONG + "weight = 0.0\n" + RAMP, "reward.parts.long: has no effect"),
        ("maxrl", FORMAT + RAMP, "reward.parts.form.ramp.to = -1.0: can make"),
        ("maxrl", GATED + "otherwise = -0.5", "reward.parts.form.gate.otherwise = -0.5: can"),
        ("maxrl", OVERLONG, "reward.parts.long: can make rewards negative"),
        ("maxrl", FORMAT + "weight = -1.0", "reward.parts.form.weight = -1.0: can make"),
        ("maxrl", FORMAT + "minimum = -1.0", "reward.parts.form.minimum = -1.0: can make"),
        ("maxrl", FORMAT + RISING + "minimum = -1.0", "reward.parts.form.minimum = -1.0: can"),
        ("maxrl", '[rollout]\ntruncation = "penalty"', "truncation_penalty = -0.5: can make"),
    ],
)
def test_rewards_that_a_credit_does_not_read_or_cannot_take_are_refused(preset, text, said):
    head = f'[objective]\npreset = "{preset}"\n'
    assert said in told(head, text)


@pytest.mark.parametrize(
    ("preset", "text"),
    [
        ("gdpo", FORMAT + '[rollout]\ntruncation = "mask_after"'),
        ("process", FUNCTION + '[reward]\ntask = "own"'),
        ("process", FUNCTION + '[reward]\ntask = ["right", "own"]'),
        ("gdpo", OVERLONG + "shape = false"),
        ("gdpo", OVERLONG + "weight = 0.0"),
        ("gdpo", '[rollout]\ntruncation = "exclude_before"'),
        ("passk_analytic", '[rollout]\ntruncation = "zero_reward"'),
        ("passk_analytic", OVERLONG + "weight = 0.0"),
        ("passk_analytic", FORMAT + "[reward]\nclip_range = [0.0, 1.0]"),
        ("passk_analytic", '[rollout]\ntruncation = "penalty"\ntruncation_penalty = -1.0'),
        ("maxrl", FORMAT),
        ("maxrl", OVERLONG + "[reward]\nclip_range = [0.0, 2.0]"),
        ("maxrl", '[rollout]\ntruncation = "penalty"\ntruncation_penalty = 0.5'),
        ("default", OVERLONG + '[rollout]\ntruncation = "penalty"'),
    ],
)
def test_rewards_that_it_can_take_are_not(preset, text):
    assert told(f'[objective]\npreset = "{preset}"\n', text) == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('kind = "plain"', 'with engine.kind = "plain"; leave it at 0'),
        ('[model]\nname = "x"\npacking = false', "with model.packing = false;"),
        ('[model]\nname = "x"\ngradient_checkpointing = true', "gradient_checkpointing = true;"),
        ('[model]\nname = "x"\nlora = { rank = 2, dropout = 0.1 }', "with model.lora.dropout > 0;"),
        ("[train]\nminibatches = 2", "with several updates a step;"),
        (
            '[train]\ninner_epochs = 2\n[model]\nname = "x"\npacking = false',
            "false and several updates",
        ),
        ('[environment.use]\nkind = "calculator"', "with an environment;"),
        ('[model]\nname = "x"\nlora = { rank = 2 }', ""),
    ],
)
def test_activations_are_kept_where_a_step_takes_them(text, said):
    found = told("", "[engine]\nmax_kept_gib = 1.5\n" + text)
    assert ("engine.max_kept_gib = 1.5: keeps nothing that is of use" in found) == bool(said)
    assert said in found


@pytest.mark.parametrize("gib", ["-0.1", "1e300", "inf", "nan"])
def test_memory_for_activations_is_a_size(gib):
    assert "max_kept_gib = " in told("", f"[engine]\nmax_kept_gib = {gib}")


def told(objective: str, text: str) -> str:
    """What is wrong with the minimal recipe, its objective and reward changed."""
    data = parse(MINIMAL + objective)
    more = parse(text)
    (part, *_), reward = data["reward"]["parts"], more.pop("reward", {})
    added = reward.pop("parts", [])
    if added and "kind" not in added[0]:
        part.update(added.pop())
    data["reward"] |= {"parts": [part, *added], **reward}
    try:
        from_table({**data, **more})
    except RecipeError as error:
        return str(error)
    return ""


def test_overlong_buffer_of_a_preset_is_a_fifth_of_a_small_budget():
    loaded = recipe('[objective]\npreset = "dapo"', "[rollout]\nmax_tokens = 1000")
    part = loaded.reward.build(max_tokens=1000).parts[-1]
    assert part.reward == SoftOverlong(max_tokens=1000, buffer=200)
    assert part.shape
    assert from_table(parse(dump(loaded))) == loaded


def test_wrapped_credits_are_built():
    loaded = recipe(
        "[objective.credit]",
        'kind = "reweight"',
        "neg_scale = 0.5",
        'credit = {kind = "kl_in_reward", beta = 0.1, credit = "rloo"}',
    )
    assert loaded.objective.build(max_tokens=1).credit == Reweight(
        credit=KLInReward(credit=Rloo(), beta=0.1), neg_scale=0.5
    )


def test_custom_parts_by_import_path():
    loaded = recipe('[objective]\ncredit = "gruppo.objective:DrGrpo"')
    assert loaded.objective.build(max_tokens=1).credit == DrGrpo()
    assert from_table(parse(dump(loaded))) == loaded
    with_options = recipe("[objective.weights]\nkind = 'gruppo.objective:Constant'\nlength = 5")
    assert with_options.objective.build(max_tokens=1).weights == Constant(length=5)


def test_reward_parts_are_flat_tables_around_the_reward():
    parts = recipe().reward.build(max_tokens=9).parts
    assert (parts[0].name, parts[0].reward, parts[0].weight) == ("right", Number(), 1.0)


def test_a_reward_function_is_named_in_long_or_short():
    short = recipe('[[reward.parts]]\nname = "own"\nkind = "my.module:score"\ntimeout_s = 5.0')
    long = recipe(
        '[[reward.parts]]\nname = "own"\nkind = "function"',
        'function = "my.module:score"\ntimeout_s = 5.0',
    )
    assert short == long
    made = short.reward.build(max_tokens=1).parts[1].reward
    assert made == Function(name="my.module:score", timeout_s=5.0)


def test_budget_of_a_length_term_is_the_rollouts_unless_given():
    text = '[[reward.parts]]\nname = "long"\nkind = "soft_overlong"\nbuffer = 10\n'
    implied = recipe(text, "[rollout]\nmax_tokens = 50").reward.build(max_tokens=50)
    given = recipe(text + "max_tokens = 40").reward.build(max_tokens=50)
    assert [p.parts[1].reward.max_tokens for p in (implied, given)] == [50, 40]


def test_mistakes_in_several_sections_come_at_once():
    text = mistakes("[rolout]", "[optim]\nlr = -1.0", "[train]\nsteps = 0", '[eval]\nk = "x"')
    for words in ('rolout: unknown section; did you mean "rollout"?', "lr = -1", "steps = 0", "k"):
        assert words in text
    assert "4 mistakes" in text


def test_a_key_in_a_section_that_does_not_exist_is_found_in_its_own():
    text = mistakes("[policy]\npacking = false\nmax_rows = 3\nnone = 1")
    assert 'policy.packing = false: unknown section; did you mean "model.packing"?' in text
    assert 'policy.max_rows = 3: unknown section; did you mean "engine.max_rows"?' in text
    assert "2 mistakes" in text
    assert "policy: unknown section; known: data, " in mistakes("[policy]\nnone = 1")


def test_rules_between_sections():
    assert "at least 2" in mistakes("[rollout]\ngroup_size = 1")
    lone = '[objective]\npreset = "rpp"\n[rollout]\ngroup_size = 1\nfilter = '
    for name in ("drop", "resample"):
        said = mistakes(f'{lone}"{name}"')
        assert f'rollout.filter = "{name}": leaves nothing to train on' in said
    assert recipe(lone + '"skip"').rollout.group_size == 1
    assert "whole groups" in mistakes("[rollout]\nprompts_per_step = 4\n[train]\nminibatches = 5")
    assert "no KL term" in mistakes("[train]\nreference_sync_steps = 5")
    assert "data.held_out" in mistakes("[eval]\npatience = 2")
    overlong = '[[reward.parts]]\nname = "l"\nkind = "soft_overlong"\nbuffer = 99\n'
    assert "buffer = 99" in mistakes(overlong, "[rollout]\nmax_tokens = 50")


def test_a_device_that_there_is_not_is_told_with_all_that_there_are():
    with pytest.raises(RecipeError) as caught:
        from_table(parse(MINIMAL.replace("[model]", '[model]\ndevice = "tpu"')))
    assert 'device = "tpu": must be auto, cpu, cuda, cuda:N, mps, xpu or xpu:N' in str(caught.value)


def test_planned_presets_say_what_is_missing():
    name = next(iter(PLANNED))
    assert PLANNED[name] in mistakes(f'[objective]\npreset = "{name}"')


def test_description_has_the_batch_arithmetic():
    text = describe(
        recipe(
            "[rollout]\nprompts_per_step = 6\ngroup_size = 4\nmax_tokens = 100",
            "[train]\nsteps = 10\nminibatches = 2\ninner_epochs = 3",
            "[objective]\npreset = 'remax'",
            "[data]\nheld_out = 7",
            "[optim]\nwarmup_steps = 100",
        )
    )
    for words in (
        "6 prompts x 4 = 24 completions a step, of at most 100 tokens (at most 2,400 a step)",
        "10 steps: 240 completions of 60 prompts",
        "6 optimizer steps per rollout (3 x 2 mini-batches of 3 whole groups), 60 in all",
        "off-policy within a rollout",
        "one greedy completion more for every prompt",
        "old log-probabilities, reference log-probabilities",
        "the warm-up is longer than the run",
        "7 held-out problems, 1 greedy and 8 at temperature 0.6 completions each",
    ):
        assert words in text, text


def test_one_update_per_rollout_is_called_on_policy():
    assert "strictly on-policy: ratios are 1" in describe(recipe())


@pytest.mark.parametrize(
    ("preset", "minibatches", "words"),
    [
        ("grpo", 1, "strictly on-policy: ratios are 1 and clipping is inactive"),
        ("grpo", 2, "ratios move away from 1 and clipping is active"),
        ("cispo", 1, "strictly on-policy: ratios are 1\n"),
        ("cispo", 2, "ratios move away from 1 and the loss weighs by them"),
        ("opo", 2, "this loss does not correct for it"),
        ("prime_default", 1, "ratios are 1, but for the engine's mismatch\n"),
    ],
)
def test_words_on_policy_and_off_are_those_of_the_loss(preset, minibatches, words):
    changes = (f'[objective]\npreset = "{preset}"', f"[train]\nminibatches = {minibatches}")
    assert words in describe(recipe(*changes))
