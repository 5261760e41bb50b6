"""The tests can fail: each planted fault, a few characters of one function, fails the test named beside it.

The function is edited in memory for one test; a fault whose text is no longer in the source must be
written anew.
"""

import inspect
import textwrap

import pytest
import test_agent
import test_envs
import test_fast
import test_methods
import test_mssm
import test_mummi_loss
import test_replay
import test_train
import test_trust

import agent
import envs
import evaluate
import fast
import mssm
import mummi_loss
import replay
import train
import trust

make = test_envs.make  # the fixtures that their tests ask for
float64, stance = test_fast.float64, test_fast.stance

FAULTS = [  # name, function, its text, the fault, the test that must fail
    # Fusion and inference, Eq. (11)
    ("1/std for 1/std^2", mssm.product_of_experts, "power == 1 else std", "True else std",
     test_mssm.test_product_of_experts_is_the_normalised_product_of_densities),
    ("no 1/std^2: a plain mean", mssm.product_of_experts, " * present.unsqueeze(-1)", " * 0 + present.unsqueeze(-1)",
     test_mssm.test_product_of_experts_is_the_normalised_product_of_densities),
    ("absent experts kept", mssm.product_of_experts, " * present.unsqueeze(-1)", "",
     test_mssm.test_product_of_experts_drops_the_absent),
    ("mean of s^f, not a sample", mssm.MSSM.fuse, "mean + std * torch.randn_like(std) if self.sample_s_f else mean", "mean",
     test_mssm.test_the_fused_observation_is_sampled_from_the_product),
    ("mask of another sensor", mssm.MSSM.fuse, "expert_std, present, self", "expert_std, present.flip(-1), self",
     test_mssm.test_the_mask_has_one_column_a_modality_in_their_order),
    ("missing not zero-filled", mssm.MSSM.fuse, "x * present[..., m, None]", "x",
     test_mssm.test_concatenation_has_zeros_where_missing),
    ("s^f in the place of h", mssm.MSSM.posterior_from_h, "[:, self.d_s_f :]", "[:, : self.d_h]",
     test_mssm.test_posterior_is_one_layer_of_s_f_and_h_together),
    ("prior for posterior", mssm.posterior_or_prior, "torch.where(observed, mean, prior_mean)", "prior_mean",
     test_mssm.test_posterior_is_one_layer_of_s_f_and_h_together),
    ("not the prior when nothing is present", mssm.posterior_or_prior, "torch.where(observed, mean, prior_mean)", "mean",
     test_mssm.test_nothing_present_leaves_exactly_the_prior),
    ("not the prior's spread when nothing is present", mssm.posterior_or_prior, "torch.where(observed, std, prior_std)", "std",
     test_mssm.test_nothing_present_leaves_exactly_the_prior),
    ("mean of s^c, not a sample", mssm.posterior_or_prior, "mean + std * noise", "mean",
     test_mssm.test_s_c_is_a_sample_of_the_posterior),
    ("action shifted by one", mssm.MSSM.observe, "zip(action, from_s_f,", "zip(action.roll(1, 0), from_s_f,",
     test_mssm.test_h_depends_on_the_action_that_led_to_it),
    ("a look into the future", mssm.MSSM.observe, "zip(action, from_s_f,", "zip(action, from_s_f.flip(0),",
     test_mssm.test_the_posterior_does_not_see_the_future),
    ("an expert's share where it is absent", mssm.MSSM.expert_shares, ".mean(-1) * present", ".mean(-1)",
     test_mssm.test_experts_shares_are_their_precisions_and_sum_to_one),

    # Gradients that a loss holds back
    ("g alone is pulled", mummi_loss.mummi, "model.g(latent)", "model.g(latent.detach())",
     test_methods.test_mummi_sums_a_bound_for_each_expert),
    ("no expert is pulled", mummi_loss.mummi, "filtered.fused.expert_mean.", "filtered.fused.expert_mean.detach().",
     test_methods.test_mummi_sums_a_bound_for_each_expert),
    ("the fused mean is not pulled", mummi_loss.mummi_b, "filtered.fused.mean.", "filtered.fused.mean.detach().",
     test_methods.test_mummi_b_has_one_bound_of_the_fused_mean),
    ("features learn nothing", mummi_loss.cvrl, "filtered.fused.s_f.", "filtered.fused.s_f.detach().",
     test_methods.test_cvrl_has_one_bound_of_projected_latents_and_features),
    ("pictures teach the decoder alone", mummi_loss.elbo, "model.decode(latent.", "model.decode(latent.detach().",
     test_methods.test_elbo_reconstructs_every_modality_that_is_present),
    ("the reward teaches its head alone", mummi_loss.shared_terms, "model.reward(latent)", "model.reward(latent.detach())",
     test_methods.test_mummi_sums_a_bound_for_each_expert),
    ("the fused prior learns alone", mummi_loss.fused_kl, "fused_prior(filtered.s_c)", "fused_prior(filtered.s_c.detach())",
     test_methods.test_the_kl_of_the_fused_observation_has_its_weight),
    ("an action is credited with one step", agent.imagine, "imagine_step(state, action)",
     "imagine_step(type(state)(*(x.detach() for x in state)), action)", test_agent.test_an_imagined_action_is_credited_with_all_that_follows),
    ("the KL is logged as it counts", mummi_loss.shared_terms, "kl.mean()", "kl.mean().clamp(min=weights.free_nats)",
     test_methods.test_the_kl_is_logged_as_it_is_not_as_it_counts),

    # What a sensor may say
    ("depth not clipped", mssm.scale, ".clamp_(0, MAX_DEPTH)", "",
     test_mssm.test_scale_knows_each_kind_of_observation),
    ("absent NaN reaches the arithmetic", mssm.scale, "torch.where(present[(...,) + (None,) * axes], x.float(), 0)", "x.float()",
     test_mssm.test_absent_values_never_reach_the_arithmetic),
    ("absent NaN masked by a product", mssm.scale, "torch.where(present[(...,) + (None,) * axes], x.float(), 0)",
     "present[(...,) + (None,) * axes] * x.float()", test_mssm.test_absent_values_never_reach_the_arithmetic),
    ("a vector's statistics are not used", mssm.scale, "else (x - mean) / std", "else x",
     test_mssm.test_a_vector_is_read_and_predicted_as_its_statistics_scale_it),
    ("a vector's spread is not used", mssm.scale, "(x - mean) / std\n", "(x - mean)\n",
     test_mssm.test_a_vector_is_read_and_predicted_as_its_statistics_scale_it),
    ("bytes taken for a vector", mssm.check_observation, "not x.is_floating_point()", "False",
     test_mssm.test_nothing_is_taken_for_something_else),

    # Objectives, Eq. (10), (15)-(17)
    ("-100 for -inf", mummi_loss.info_nce, ", absent_logit)", ", -100)",
     test_mummi_loss.test_info_nce_equals_the_double_loop_when_some_are_absent),
    ("rows masked, not columns", mummi_loss.info_nce, "masked_fill(~present &", "masked_fill(~present.unsqueeze(1) &",
     test_mummi_loss.test_what_is_absent_changes_no_bound),
    ("a finite mask on the rows", mummi_loss.info_nce, "masked_fill(~present & present.any(), absent_logit)",
     "masked_fill(~present.unsqueeze(1), -100)",
     test_mummi_loss.test_info_nce_equals_the_double_loop_when_some_are_absent),
    ("positives off by one step", mummi_loss.info_nce, "(log_f, positive", "(log_f.roll(1, 1), positive",
     test_mummi_loss.test_info_nce_equals_the_double_loop_when_some_are_absent),
    ("distances in bfloat16", mummi_loss.log_density_ratio, "enabled=False", "enabled=True",
     test_mummi_loss.test_log_density_ratio_stays_in_float32_under_autocast),
    ("mean over absent rows too", mummi_loss.mean_over, "present.sum().clamp(min=1)", "len(present)",
     test_mummi_loss.test_mummi_loss_is_the_sum_written_out),
    ("KL reversed", mummi_loss.gaussian_kl, "(mean_q, std_q, mean_p, std_p)", "(mean_p, std_p, mean_q, std_q)",
     test_mummi_loss.test_gaussian_kl_of_the_posterior_from_the_prior),
    ("free nats per step", mummi_loss.mummi_loss, "kl.mean().clamp(min=free_nats)", "kl.clamp(min=free_nats).mean()",
     test_mummi_loss.test_free_nats_apply_to_the_mean_kl_not_to_each_step),
    ("free nats per step, ELBO", mummi_loss.elbo_loss, "kl.mean().clamp(min=free_nats)", "kl.clamp(min=free_nats).mean()",
     test_mummi_loss.test_free_nats_apply_to_the_mean_kl_not_to_each_step),
    ("rewards shifted by one step", mummi_loss.shared_terms, 'batch["reward"].flatten()', 'batch["reward"].roll(1, 0).flatten()',
     test_methods.test_mummi_sums_a_bound_for_each_expert),
    ("absent modalities reconstructed", mummi_loss.elbo_loss, "torch.where(present[m], log_p, 0.0)", "log_p",
     test_mummi_loss.test_an_absent_modality_adds_no_likelihood),
    ("lambda^m dropped", mummi_loss.mummi_loss, "weights[m] *", "1.0 *",
     test_mummi_loss.test_mummi_loss_is_the_sum_written_out),
    ("touch weighs as much as images", mummi_loss.contrastive_loss, "weights.modalities.get(name, 1.0)", "1.0",
     test_methods.test_mummi_sums_a_bound_for_each_expert),
    ("another sensor's mask in its bound", mummi_loss.mummi, "filtered.present.flatten(0, 1)", "filtered.present.flip(-1).flatten(0, 1)",
     test_methods.test_mummi_sums_a_bound_for_each_expert),
    ("ends learnt for goings-on", mummi_loss.shared_terms, "(log_odds, continues,", "(log_odds, 1 - continues,",
     test_methods.test_continuation_adds_the_log_likelihood_of_going_on),
    ("goings-on made unlikely", mummi_loss.shared_terms, "log_reward - F.binary", "log_reward + F.binary",
     test_methods.test_continuation_adds_the_log_likelihood_of_going_on),

    # Behaviour, Eq. (18), (19)
    ("lambda^n for lambda^(n-1)", agent.lambda_return, "(1 - lambda_) *", "(1 - lambda_) * lambda_ *",
     test_agent.test_lambda_return_is_the_weighted_sum_of_n_step_returns),
    ("value one step early", agent.lambda_return, "value[1:]", "value[:-1]",
     test_agent.test_lambda_return_at_0_is_one_step_and_at_1_all_rewards),
    ("bootstrap dropped", agent.lambda_return, "[], bootstrap", "[], 0 * bootstrap",
     test_agent.test_lambda_return_is_the_weighted_sum_of_n_step_returns),
    ("rewards one step early", agent.Agent.returns, "reward(latent[:-1])", "reward(latent[1:])",
     test_agent.test_update_minimises_both_objectives_of_the_imagined_states),
    ("ends one step early", agent.Agent.returns, "continuation(latent[:-1])", "continuation(latent[1:])",
     test_agent.test_where_an_episode_may_end_its_future_counts_less),
    ("ends do not shorten the returns", agent.Agent.returns, "discount = discount * torch.sigmoid", "_ = discount * torch.sigmoid",
     test_agent.test_where_an_episode_may_end_its_future_counts_less),
    ("log odds for a probability", agent.Agent.returns, "torch.sigmoid(self.model.continuation(latent[:-1]))",
     "self.model.continuation(latent[:-1])", test_agent.test_update_minimises_both_objectives_where_episodes_may_end),
    ("ends asked for unasked", agent.Agent.returns, "if self.continuation:", "if True:",
     test_agent.test_where_an_episode_may_end_its_future_counts_less),
    ("weights one step early", agent.Agent.returns, "discount[:-1]]).cumprod", "discount[1:]]).cumprod",
     test_agent.test_where_an_episode_may_end_its_future_counts_less),
    ("weights that are learnt", agent.Agent.returns, "weight.detach()", "weight",
     test_agent.test_an_action_is_blamed_for_the_end_it_leads_to_but_weights_are_no_way_to_learn),
    ("imagined after the end", agent.Agent.update, 'if "continues" in batch else', "if False else",
     test_agent.test_update_minimises_both_objectives_where_episodes_may_end),
    ("behaviour learnt unasked", agent.Agent.update, "if behaviour:", "if True:",
     test_agent.test_the_world_model_can_learn_alone),
    ("target not detached", agent.critic_loss, "returns.detach()", "returns",
     test_agent.test_critic_loss_treats_the_returns_as_targets),
    ("actor's gradient reaches the model", agent.Agent.optimise, "inputs=parameters[name], ", "",
     test_agent.test_each_loss_reaches_the_parameters_of_its_own_module_alone),
    ("policy's latents not detached", agent.imagine, ".detach()", "",
     test_agent.test_imagination_starts_detached_and_the_policy_sees_no_gradient),
    ("imagination starts attached", mssm.MSSM.state, "filtered.h.flatten(0, 1).detach()", "filtered.h.flatten(0, 1)",
     test_mssm.test_where_imagination_starts_carries_no_gradient),
    ("optimiser without the experts", fast.FastAgent.adam, "module.parameters(), learning_rate",
     "[p for name, p in module.named_parameters() if 'experts' not in name], learning_rate",
     test_agent.test_every_parameter_moves_and_belongs_to_one_optimiser),

    # Acting
    ("acting without fusion", agent.Agent.filter, "present.unsqueeze(0)", "torch.zeros_like(present).unsqueeze(0)",
     test_agent.test_acting_filters_as_training_does),
    ("acting on zero-filled experts", agent.Agent.filter, "present.unsqueeze(0)", "torch.ones_like(present).unsqueeze(0)",
     test_agent.test_acting_filters_as_training_does),
    ("acting forgets its last action", agent.Agent.act, "Memory(state, action)", "Memory(state, memory.action)",
     test_agent.test_acting_filters_as_training_does),
    ("exploration noise in evaluation", agent.Agent.act, "if explore:", "if True:",
     test_agent.test_exploration_noise_only_with_explore),
    ("evaluation never samples", agent.Agent.act, "explore or self.sample_in_evaluation", "explore",
     test_agent.test_evaluation_can_sample_the_actor),
    ("memory kept across episodes", agent.Agent.filter, "self.forget(memory, first)", "memory",
     test_agent.test_an_episodes_first_decision_forgets_the_memory),
    ("MPC by environment 0 alone", agent.Agent.plan, "[0].sum()", "[0][0]",
     test_agent.test_mpc_follows_the_gradient_of_each_environments_own_return),
    ("MPC downhill", agent.Agent.plan, "(a + self.mpc_rate", "(a - self.mpc_rate",
     test_agent.test_mpc_raises_the_planned_return),

    # What is fast
    ("layers of a group exchanged", fast.Steps.__call__, "zip(self.layers,", "zip(reversed(self.layers),",
     test_fast.test_layers_that_read_the_same_share_a_product_and_each_gets_its_own_gradient),
    ("a group's products kept for another input", fast.Steps.__call__, "x is not self.x", "self.x is None",
     test_fast.test_layers_that_read_the_same_share_a_product_and_each_gets_its_own_gradient),
    ("steps shared between passes", fast.Parameters.backward, "ctx.passed.pop(torch._C._current_graph_task_id())",
     "[step for steps in ctx.passed.values() for step in steps]",
     test_fast.test_a_backward_pass_that_needs_no_parameters_leaves_nothing_to_the_next),
    ("the last step's gradient alone", fast.Parameters.backward, "zip(*steps)", "zip(*steps[:1])",
     test_fast.test_the_gradient_for_all_steps_at_once_is_the_sum_over_the_steps),
    ("a bias without its gradient", fast.Parameters.backward, "gradient.sum(0)", "0 * gradient.sum(0)",
     test_fast.test_with_and_without_it_an_update_is_the_same),
    ("second derivatives let through", fast.Step.backward, "torch.is_grad_enabled()", "False",
     test_fast.test_second_derivatives_are_refused_and_right_without_it),
    ("the inputs' errors taken for a GPU's", fast.FastAgent.run, "except ValueError:", "except KeyError:",
     test_fast.test_what_is_wrong_with_the_inputs_is_no_reason_to_go_on_plainly),
    ("graphs tried again and again", fast.FastAgent.run, "self.cuda, self.graphs = False, {}", "pass",
     test_fast.test_where_a_graph_cannot_be_captured_it_goes_on_plainly_and_says_so_once),
    ("products in bfloat16 for speed", fast.faster_exact_product, "error < 1e-5", "True",
     test_fast.test_the_faster_product_is_taken_if_it_is_float32),
    ("slower products", fast.faster_exact_product, '"AuthenticAMD" not in processor()', "False",
     test_fast.test_the_faster_product_is_taken_if_it_is_float32),
    ("the process's precision changed by a measurement", fast.faster_exact_product,
     "    torch.set_float32_matmul_precision(before)\n", "",
     test_fast.test_the_faster_product_is_taken_if_it_is_float32),

    # What is missing, and what is seen in evaluation
    ("28 % missing, not 37.5 %", envs.missing_schedule, "total = round(rate * steps)", "total = round(0.752 * rate * steps)",
     test_envs.test_schedule_has_exactly_its_rate),
    ("the released process, 28 % in fact", envs.MissingSensors.draw_missing, "SCHEDULES[self.missing_process]", 'SCHEDULES["released"]',
     test_envs.test_schedules_of_an_episode_are_exact_and_independent),
    ("one set of scenes for both splits", envs.open_backgrounds, "SPLITS.index(split))", "0)",
     test_envs.test_training_and_evaluation_scenes_are_disjoint),
    ("training's backgrounds in training's evaluation", train.main, 'split="eval"', 'split="train"',
     test_train.test_evaluations_are_on_unseen_backgrounds_and_without_exploration),
    ("training's backgrounds in evaluate.py", evaluate.evaluate_condition, 'split="eval"', 'split="train"',
     test_train.test_evaluations_are_on_unseen_backgrounds_and_without_exploration),
    ("exploration in evaluation episodes", evaluate.run_episodes, "explore=False", "explore=True",
     test_train.test_evaluations_are_on_unseen_backgrounds_and_without_exploration),

    # Sensors that lie
    ("a sensor that never tells the truth", envs.LyingSensors.lie, "if lying[name]:", "if True:",
     test_trust.test_a_sensor_lies_exactly_as_often_as_asked_and_only_then),
    ("another rate of lies", envs.LyingSensors.reset, "self.rate, MAX_SEGMENT", "0.4, MAX_SEGMENT",
     test_trust.test_a_sensor_lies_exactly_as_often_as_asked_and_only_then),
    ("less late than said", envs.LyingSensors.reading, '-1 if fault == "frozen" else 0', "-1",
     test_trust.test_each_fault_is_what_it_is_called),
    ("compared with what was known afterwards", trust.usual_distances, "x[:-1].flatten(0, 1)", "x[1:].flatten(0, 1)",
     test_trust.test_surprise_is_the_distance_from_the_prediction_of_one_step_before),
    ("repetitions believed", trust.Trust.__call__, "nearest < self.repeat,", "nearest < 0,",
     test_trust.test_a_reading_that_repeats_is_dropped_where_honest_ones_never_do),
    ("the less surprising loses a quarrel", trust.Trust.__call__, "doubt.unsqueeze(-1) > doubt", "doubt.unsqueeze(-1) < doubt",
     test_trust.test_of_two_that_quarrel_the_more_surprising_is_dropped),
    ("how sure an expert is does not count", trust.Trust.__call__, "(2 * (log_std - self.log_std))", "(0 * log_std)",
     test_trust.test_an_expert_that_is_less_sure_than_usual_loses_a_quarrel),
    ("no other hearing", trust.Trust.__call__, "(silent + 1).clamp(max=AHEAD)", "silent * 0",
     test_trust.test_a_sensor_that_was_silent_for_long_may_be_farther_off_and_then_gets_a_hearing),
    ("suspected before anything was predicted", trust.Trust.__call__, "torch.where(goes_on, self.silent, AHEAD)", "self.silent * 0",
     test_trust.test_a_reading_far_from_the_prediction_is_dropped),

    # Replay
    ("the last sequence too often", replay.Replay.choose, "length + 1,", "length + 3,",
     test_replay.test_every_window_is_as_likely_as_any_other),
    ("sequences from one episode into the next in the file", replay.Replay.choose, "np.minimum(rows[episode] - offset, length - t)", "length - t",
     test_replay.test_where_first_is_kept_a_sequence_goes_on_with_the_beginning_of_an_episode),
    ("short episodes hardly ever drawn", replay.Replay.choose, "rows if", "np.maximum(rows - length + 1, 1) if",
     test_replay.test_where_first_is_kept_every_row_is_as_likely_as_any_other),
    ("long episodes gone on with more often", replay.Replay.choose, "rng.integers(len(rows), size=len(b))", "rng.choice(episode, size=len(b))",
     test_replay.test_where_first_is_kept_every_row_is_as_likely_as_any_other),
    ("one episode's memory of another", mssm.MSSM.observe, "first is not None", "False",
     test_mssm.test_another_episode_begins_in_a_state_of_zeros),
    ("overwritten episodes kept", replay.Replay.add, "(starts + lengths <= first) |", "(starts >= 0) |",
     test_replay.test_sequences_stay_inside_one_episode_and_return_its_rows_unchanged),
    ("overwritten episodes restored", replay.Replay.load_state_dict,
     "np.array_equal(serials[e[0] : e[0] + e[1]], np.full(e[1], e[2]))", "e[2] in serials[e[0] : e[0] + e[1]]",
     test_replay.test_reopened_it_does_not_draw_what_was_overwritten_since),
]  # fmt: skip
CHOSEN = dict(  # for a test that runs for several
    method="mummi", steps=501, rate=0.375, max_length=14, axes=(5, 7), nonsense=float("nan"), fusion="product", fast=True,
    fault="black", sensor="camera", change=dict(touch=test_mssm.uint8(2)), message="'touch' is torch.uint8", bfloat16=False,
    lengths=[5, 60, 7, 3, 30],
)  # fmt: skip
SPECIAL = {  # the arguments that alone show a fault: a method; a processor, and whether oneDNN's product is exact there
    "pictures teach the decoder alone": dict(method="mssm_e"),
    "products in bfloat16 for speed": dict(vendor="AuthenticAMD", exact=False, expected="highest", before="highest"),
    "slower products": dict(vendor="GenuineIntel", exact=True, expected="highest", before="highest"),
    "the process's precision changed by a measurement": dict(vendor="AuthenticAMD", exact=True, expected="medium", before="highest"),
}


@pytest.mark.parametrize("name, function, text, fault, test", FAULTS, ids=[row[0] for row in FAULTS])
def test_a_planted_fault_fails_its_test(monkeypatch, request, name, function, text, fault, test):
    function = inspect.unwrap(function)  # as it is before a GPU compiles it
    source, planted = textwrap.dedent(inspect.getsource(function)), {}
    assert source.count(text) == 1, f"write the fault anew: {text!r} is not once in {function.__qualname__}"
    exec(source.replace(text, fault), function.__globals__, planted)
    monkeypatch.setattr(function, "__code__", inspect.unwrap(planted[function.__name__]).__code__)  # for all who hold it
    chosen = CHOSEN | SPECIAL.get(name, {})
    names = inspect.signature(test).parameters
    arguments = {name: chosen[name] if name in chosen else request.getfixturevalue(name) for name in names}
    with pytest.raises((AssertionError, pytest.fail.Exception)):  # the latter: what should be raised was not
        test(**arguments)
