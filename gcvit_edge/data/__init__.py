"""Images and labels. No torch."""

from gcvit_edge.data.chart import draw_chart as draw_chart
from gcvit_edge.data.decoding import MAX_UNREADABLE as MAX_UNREADABLE
from gcvit_edge.data.decoding import Pixels as Pixels
from gcvit_edge.data.decoding import Undecodable as Undecodable
from gcvit_edge.data.decoding import decode_images as decode_images
from gcvit_edge.data.decoding import decoder as decoder
from gcvit_edge.data.decoding import find_readable as find_readable
from gcvit_edge.data.decoding import inputs as inputs
from gcvit_edge.data.decoding import read_image as read_image
from gcvit_edge.data.folder import ImageFolder as ImageFolder
from gcvit_edge.data.folder import check_apart as check_apart
from gcvit_edge.data.folder import check_depth as check_depth
from gcvit_edge.data.folder import check_empty as check_empty
from gcvit_edge.data.folder import class_indices as class_indices
from gcvit_edge.data.folder import find_images as find_images
from gcvit_edge.data.folder import has_all_classes as has_all_classes
from gcvit_edge.data.labels import Labels as Labels
from gcvit_edge.data.labels import read_labels as read_labels
from gcvit_edge.data.preprocessing import Preprocessing as Preprocessing
from gcvit_edge.data.preprocessing import default_preprocessing as default_preprocessing
from gcvit_edge.data.preprocessing import read_preprocessing as read_preprocessing
from gcvit_edge.data.preprocessing import upright_rgb as upright_rgb
