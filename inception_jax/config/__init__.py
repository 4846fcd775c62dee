"""The typed configuration of a run; its names are reached from here.

Each is imported "as" itself: that exports it.
"""

from inception_jax.config.durations import Duration as Duration, parse_duration as parse_duration
from inception_jax.config.fields import (
    check_path as check_path,
    did_you_mean as did_you_mean,
    entry_group as entry_group,
    entry_type as entry_type,
    fill_open as fill_open,
    get as get,
    is_mapping as is_mapping,
    is_open as is_open,
    leaves as leaves,
    mapping_of as mapping_of,
    plain as plain,
    put as put,
    type_name as type_name,
    unknown_field as unknown_field,
)
from inception_jax.config.other_names import RENAMED as RENAMED, current_path as current_path
from inception_jax.config.schema import (
    BIT_DEPTHS as BIT_DEPTHS,
    CONV5X5 as CONV5X5,
    NORMS as NORMS,
    OPEN as OPEN,
    STEMS as STEMS,
    Augment as Augment,
    Bucket as Bucket,
    Checkpoint as Checkpoint,
    Config as Config,
    Data as Data,
    Evaluation as Evaluation,
    Expected as Expected,
    Init as Init,
    Log as Log,
    Model as Model,
    Optimizer as Optimizer,
    Schedule as Schedule,
    Train as Train,
    View as View,
    Watch as Watch,
)
from inception_jax.config.serialization import (
    Record as Record,
    changes as changes,
    flatten as flatten,
    from_dict as from_dict,
    read_record as read_record,
    read_settings as read_settings,
    shared as shared,
    to_dict as to_dict,
    unrecorded_bit_depth as unrecorded_bit_depth,
)
from inception_jax.config.timeline import Timeline as Timeline
from inception_jax.config.validation import named_parts as named_parts, validate as validate
from inception_jax.config.views import views as views
