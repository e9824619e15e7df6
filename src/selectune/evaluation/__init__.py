"""What a model answers on held-out examples, and what a difference between two models is worth."""

from selectune.evaluation.intervals import Interval as Interval
from selectune.evaluation.intervals import Metric as Metric
from selectune.evaluation.intervals import compare_paired as compare_paired
from selectune.evaluation.intervals import compare_seeds as compare_seeds
from selectune.evaluation.intervals import mean_interval as mean_interval
from selectune.evaluation.options import Evaluation as Evaluation
from selectune.evaluation.options import check_questions as check_questions
from selectune.evaluation.options import evaluate as evaluate
from selectune.evaluation.verdict import Verdict as Verdict
from selectune.evaluation.verdict import verdict as verdict
