"""What a model answers on held-out examples, and what a difference between two models is worth."""

from selectune.evaluation.estimate import Estimate as Estimate
from selectune.evaluation.generation import Generation as Generation
from selectune.evaluation.generation import generate_answers as generate_answers
from selectune.evaluation.generic_text import GenericLoss as GenericLoss
from selectune.evaluation.generic_text import compare_generic as compare_generic
from selectune.evaluation.generic_text import generic_loss as generic_loss
from selectune.evaluation.intervals import Interval as Interval
from selectune.evaluation.intervals import Metric as Metric
from selectune.evaluation.intervals import compare_paired as compare_paired
from selectune.evaluation.intervals import compare_seeds as compare_seeds
from selectune.evaluation.intervals import mean_interval as mean_interval
from selectune.evaluation.options import Evaluation as Evaluation
from selectune.evaluation.options import check_questions as check_questions
from selectune.evaluation.options import evaluate as evaluate
from selectune.evaluation.options import together as together
from selectune.evaluation.transfer import RoundRobin as RoundRobin
from selectune.evaluation.transfer import Transfer as Transfer
from selectune.evaluation.transfer import compare_transfer as compare_transfer
from selectune.evaluation.transfer import round_robin as round_robin
from selectune.evaluation.transfer import transfer as transfer
from selectune.evaluation.transfer import transfer_metrics as transfer_metrics
from selectune.evaluation.verdict import Verdict as Verdict
from selectune.evaluation.verdict import verdict as verdict
