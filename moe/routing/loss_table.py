"""Table of all auxiliary losses: the configuration key that weights each one, its formula, meaning and paper.

The losses are computed in `moe.routing.losses` and in the routers. This module does not import torch, so that the
configuration and the analysis can read it quickly. The letters in the formulas are explained in docs/metrics.md.
"""

from typing import NamedTuple


class Loss(NamedTuple):
    """An auxiliary loss. It is a mean over the tokens of a micro-batch and is logged unweighted."""

    weight: str  # key of the configuration that weights it; its values in all layers are weighted alike and summed
    formula: str
    meaning: str
    paper: str


# Losses that any router can have. `weight` is a key at the root of the configuration.
LOSSES = {
    "load_balance": Loss(
        "lb",
        "E Σ_e f_e P_e",
        "Load-balance loss. 1 is balanced for every K and E; about E/K if all tokens choose the same K experts.",
        "Switch Transformer, 2101.03961, eq. 4-6",
    ),
    "load_balance_sequence": Loss(
        "lb_sequence",
        "E Σ_e f_e P_e, of each sequence by itself",
        "Load-balance loss of each sequence (block), averaged over sequences.",
        "DeepSeek-V3, 2412.19437, eq. 17-20",
    ),
    "load_balance_global": Loss(
        "lb_global",
        "E Σ_e f_e P_e, f over the optimizer step so far",
        "Load-balance loss of the whole batch of an optimizer step: single micro-batches may specialize.",
        "Qiu et al., 2501.11873",
    ),
    "load_balance_document": Loss(
        "lb_document",
        "E Σ_e f_e P_e, of each document by itself",
        "Load-balance loss of each document, averaged over tokens. Only blocks of conversations mark documents; in "
        "other blocks it is that of each sequence.",
        "",
    ),
    "load_balance_first": Loss(
        "lb_first",
        "E Σ_e g_e P_e",
        "Load-balance loss of first choices; g is the share of tokens whose most probable expert is e. With one expert "
        "per token it is the load-balance loss.",
        "GShard, 2006.16668, algorithm 1",
    ),
    "importance_cv": Loss(
        "importance",
        "CV² over experts of Σ_t p_te = E Σ_e P_e² - 1",
        "Imbalance of the summed probabilities. Unlike the load-balance loss it reads no counts.",
        "Shazeer et al., 1701.06538, eq. 6-7; there of the gates",
    ),
    "expected_load_cv": Loss(
        "load",
        "CV² over experts of Σ_t P(t takes e if the noise of e is drawn again)",
        "Imbalance of the load that is expected under `noise`. Unlike a count of tokens it has a gradient. In training "
        "alone. docs/routing.md says which routers have it. Computed only where it is weighted.",
        "Shazeer et al., 1701.06538, appendix A; with one standard deviation for all logits",
    ),
    "negative_information": Loss(
        "mutual_information",
        "-I(t; e) = mean_t H(p_t) - H(P)",
        "Minus the mutual information of token and expert in nats: decisive for each token, even over all. At least "
        "-ln E.",
        "DS-MoE, Pan et al., 2404.05567",
    ),
    "router_z": Loss(
        "z",
        "mean_t (ln Σ_e exp z_te)²",
        "Router z-loss: keeps the logits small.",
        "ST-MoE, 2202.08906, eq. 5",
    ),
    "router_entropy": Loss(
        "router_entropy",
        "mean_t H(p_t)",
        "Mean entropy of the router's probabilities in nats. A positive weight sharpens the router, up to collapse.",
        "",
    ),
    "gate_variance": Loss(
        "gate_variance",
        "-Σ_e var_t p_te",
        "Minus the variance over tokens of each expert's probability. A positive weight makes decisions differ.",
        "Guo et al., 2505.22323, L_v",
    ),
    "simbal": Loss(
        "simbal",
        "‖W Wᵀ - I‖₁",
        "Entrywise distance of the experts' router rows from orthonormal, so that similar tokens keep similar routing.",
        "SimBal, Omi et al., 2506.14038",
    ),
    "expert_router_coupling": Loss(
        "erc",
        "mean_ij of [M_ij - M_ii]_+ + [M_ji - M_ii]_+, M_ij = ‖W_j r_i‖",
        "How much more the router row of an expert excites other experts, and other rows excite the expert. r_i is row "
        "i times uniform noise, W_j the first matrix of expert j. Computed only where it is weighted.",
        "ERC, Lv et al., 2512.23447; alpha = 1",
    ),
    "output_orthogonality": Loss(
        "output_orthogonality",
        "mean of cos² over pairs of a token's experts",
        "Squared cosine of the outputs that two experts give for the same token. Computed only where it is weighted.",
        "Guo et al., 2505.22323, L_o",
    ),
}

# The keys of the losses that need a router's probabilities. Those of the balance losses also need uneven loads.
BALANCE_WEIGHTS = frozenset(("lb", "lb_sequence", "lb_global", "lb_document"))
# The keys of the losses that are constant if every token goes to all experts.
CHOICE_WEIGHTS = BALANCE_WEIGHTS | {"load"}
PROBABILITY_WEIGHTS = BALANCE_WEIGHTS | {
    "lb_first",
    "importance",
    "mutual_information",
    "router_entropy",
    "gate_variance",
}

# The keys of losses that are computed only where they are weighted.
COSTLY = frozenset(("load", "erc", "output_orthogonality"))

# Losses that one router brings along. `weight` is a key of conf/router/<router>.yaml.
ROUTER_LOSSES = {
    "importance": Loss(
        "router.importance",
        "CV² over experts of Σ_t gate_te",
        "Imbalance of the summed gates (`router=noisy_topk`).",
        "Shazeer et al., 1701.06538",
    ),
    "load": Loss(
        "router.load",
        "CV² over experts of the expected load",
        "Imbalance of the number of tokens expected under the router's noise (`router=noisy_topk`).",
        "Shazeer et al., 1701.06538",
    ),
    "null_balance": Loss(
        "router.balance",
        "S Σ_s f_s P_s over S experts and null experts",
        "Load-balance loss that counts null experts too (`router=null_experts`). 1 is balanced.",
        "AdaMoE, Zeng et al., 2406.13233",
    ),
    "heterogeneous_balance": Loss(
        "router.balance",
        "(Σ_s 1/η_s) Σ_s η_s f_s P_s over S experts and zero-computation experts",
        "Load-balance loss in which zero-computation experts weigh η = tau and others 1 (`router=moe_plus_plus`). "
        "1 is balanced.",
        "MoE++, Jin et al., 2410.07348, eq. 7",
    ),
    "phi_balance": Loss(
        "router.balance",
        "Σ_e P_e ln(E m_e)",
        "Mean probabilities times the price of each expert, m being a moving average of P over steps "
        "(`router=phi_balancing`); with potential=euclidean, the price is m_e - 1/E. 0 is balanced.",
        "phi-balancing, Chen et al., 2605.15403",
    ),
    "sparsity": Loss(
        "router.coefficient",
        "mean_t Σ_e f_e gate_te E / target",
        "L1 norm of the gates, stronger for popular experts (`router=relu`); f_e: share of tokens that take expert e. "
        "The key sets the first weight, which then adapts.",
        "ReMoE, Wang et al., 2412.14711",
    ),
    "entropy": Loss(
        "router.entropy",
        "mean_t H(p_t)",
        "Mean entropy of the router's probabilities in nats: keeps the number of experts small (`router=top_p`, "
        "`dtop_p`).",
        "Huang et al., 2403.07652",
    ),
    "latent_kl": Loss(
        "router.kl",
        "mean_t KL(N(m_t, σ_t²), N(0, 1))",
        "Distance of the latent codes from a standard normal distribution in nats (`router=latent_prototypes`).",
        "LPR, Yang, 2506.21328",
    ),
    "latent_diversity": Loss(
        "router.diversity",
        "‖P Pᵀ - I‖_F",
        "Distance of the normalized prototypes from orthogonal (`router=latent_prototypes`).",
        "LPR, Yang, 2506.21328",
    ),
    "latent_alignment": Loss(
        "router.alignment",
        "mean of (Σ_i softmax(cos)_ti p_i - z_t)²",
        "Distance of latent codes from their mixtures of prototypes (`router=latent_prototypes`).",
        "LPR, Yang, 2506.21328",
    ),
    "cosine_similarity": Loss(
        "router.cosine_similarities_loss_coef",
        "mean_te s_te²",
        "Squared similarity of routing and expression vectors (`router=spectra`).",
        "",
    ),
    "srip": Loss(
        "router.so_lambda_max",
        "0.7 ‖G - I‖_F² + 0.3 σ_max(G - I)²",
        "Distance of the experts' mean expression vectors from orthogonal; G is their Gram matrix (`router=spectra`). "
        "The weight warms up.",
        "Bansal et al., 1810.09102",
    ),
}
