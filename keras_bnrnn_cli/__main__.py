import sys

from keras_bnrnn_cli import main

sys.exit(main())
