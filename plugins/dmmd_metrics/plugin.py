"""Registers the metrics and feature networks."""

from __future__ import annotations

from dmmd_core import PluginRegistrar, hookimpl


@hookimpl
def dmmd_register(registry: PluginRegistrar) -> None:
    """Register the components of this package."""
    from dmmd_metrics.class_accuracy import ClassAccuracy
    from dmmd_metrics.class_histogram import ClassHistogram
    from dmmd_metrics.classifier import SmallClassifier
    from dmmd_metrics.copies import Copies
    from dmmd_metrics.entropy import TokenEntropy
    from dmmd_metrics.feature_networks import Inception, NetworkFile
    from dmmd_metrics.fid import Fid
    from dmmd_metrics.frechet import FrechetDistance
    from dmmd_metrics.language_models import Trained, TransformersCausal
    from dmmd_metrics.precision_recall import PrecisionRecall
    from dmmd_metrics.product_bound import ProductBound
    from dmmd_metrics.text import GenerativePerplexity, GradientMoment, Mauve, NgramDivergence
    from dmmd_metrics.total_variation import TotalVariation
    from dmmd_metrics.within_class import WithinClassDiversity

    registry.add("features", "small_classifier", SmallClassifier)
    registry.add("features", "inception", Inception)
    registry.add("features", "network_file", NetworkFile)
    registry.add("language_model", "causal_transformer", Trained)
    registry.add("language_model", "transformers_causal", TransformersCausal)
    registry.add("metric", "gradient_moment", GradientMoment)
    registry.add("metric", "generative_perplexity", GenerativePerplexity)
    registry.add("metric", "ngram_divergence", NgramDivergence)
    registry.add("metric", "mauve", Mauve)
    registry.add("metric", "total_variation", TotalVariation)
    registry.add("metric", "product_bound", ProductBound)
    registry.add("metric", "frechet_distance", FrechetDistance)
    registry.add("metric", "fid", Fid)
    registry.add("metric", "precision_recall", PrecisionRecall)
    registry.add("metric", "class_histogram", ClassHistogram)
    registry.add("metric", "class_accuracy", ClassAccuracy)
    registry.add("metric", "within_class_diversity", WithinClassDiversity)
    registry.add("metric", "token_entropy", TokenEntropy)
    registry.add("metric", "copies", Copies)
