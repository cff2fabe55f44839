"""Word lists of the demo task and of the text that the demo base is pretrained on. Plain data."""

# ruff: noqa: SIM905 (a list of words reads better as words)

FIRST = """Maria Anna Peter Lucas Emma Oliver Sofia Daniel Laura Thomas Nina Simon Clara Victor Helen Marco Julia
Oscar Alice Martin Ruth Felix Diana Hugo Irene Paul Vera Leon Grace Adam Eva Robert Carla Ivan Rosa
Samuel Lena Arthur Olga David Mona Frank Ada George Nora Walter Tara Henry Amir Wendy Bruno Yara Conrad
Zoe Edgar Flora Gavin Hanna Jonas Karen Kevin Linda Miles Naomi Owen Petra Quentin Rita Stefan Teresa
Ulrich Viola William Xenia Jack Kira Louis Mabel Noah Priya Ravi Sunita Kenji Yuki Chen Mei Omar Leila
Kofi Ama Diego Lucia Pedro Ines Ali Fatima Erik Astrid""".split()

LAST = """Lopez Smith Meyer Brown Rossi Novak Silva Jones Weber Costa Clark Young Baker Cooper Fischer Hill King
Lee Martin Moore Nelson Olsen Parker Reed Scott Taylor Turner Vega Walker White Adams Bell Carter Davis
Ellis Foster Grant Hayes Irving James Keller Lambert Mason Nash Owens Porter Quinn Rivera Stone Torres
Unger Vance Wagner Wood York Zeller Berg Chan Dunn Engel Frost Garcia Haas Ito Jensen Khan Lang Marsh
Nguyen Ortiz Patel Ramos Sato Tanaka Wong Yilmaz Okafor Mensah Ivanov Popov Kowalski Horvat Santos Moreau
Dubois Bauer Winter Sharp Price Field Brooks Lane""".split()

CITY = """Lisbon Paris Berlin Madrid Rome Vienna Prague Dublin Oslo Athens Warsaw Geneva Milan Porto Zurich Hamburg
Boston Chicago Denver Seattle Dallas Toronto Lima Quito Bogota Santiago Havana Cairo Nairobi Lagos Accra
Dakar Tunis Delhi Mumbai Tokyo Kyoto Seoul Taipei Hanoi Bangkok Manila Sydney Perth Auckland Helsinki
Stockholm Bergen Bristol Leeds York Glasgow Cork Lyon Nice Turin Naples Bilbao Seville Krakow Riga
Vilnius Tallinn Sofia Zagreb Split Basel Bern Ghent Antwerp Utrecht Delft Malmo Aarhus Reno Austin Tampa
Miami Oakland Portland""".split()

ITEM = """kettle lamp chair table clock mirror basket bottle blanket candle carpet drum guitar flute helmet jacket
ladder bucket hammer shovel bicycle tent pillow towel ribbon notebook pencil wallet saddle lantern vase
teapot plate bowl cup spoon ring bell box bag rope tray desk stool cabinet shelf camera radio kite puzzle
doll robot boat wagon sofa curtain hat scarf glove belt boot coat shirt apron fan heater printer screen
keyboard cable battery mug jar barrel crate compass telescope globe map flag whistle brick tile nail
wheel""".split()

TRAIT = """copper wooden red blue green yellow black white grey silver golden brass glass plastic leather cotton
woollen silk paper stone steel small large round square heavy light old new cheap soft hard striped
painted folding portable tall short wide narrow""".split()

DAY = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()

MONTH = "January February March April May June July August September October November December".split()

JOB = """doctor teacher baker farmer pilot nurse lawyer painter singer driver plumber tailor sailor actor writer
judge gardener chemist dentist engineer librarian butcher carpenter waiter cook guard miner potter banker
clerk""".split()

ANIMAL = """cat dog horse cow sheep goat pig rabbit fox wolf bear lion tiger monkey parrot owl eagle duck goose
turtle frog snake whale dolphin shark bee ant spider camel donkey""".split()

FOOD = """bread cheese rice soup apple banana orange lemon grape cherry potato tomato onion carrot pepper honey
butter milk salad pasta cake pie egg fish chicken bean nut melon pear plum""".split()

PLACE = """market garden library museum station harbour bridge park school hospital theatre factory village castle
forest river lake beach mountain valley office kitchen tower church farm hotel airport""".split()

MOOD = "happy sad tired angry calm proud nervous excited bored curious hungry cold".split()

VERB = """walk jump talk work wait look play cook paint clean open close help visit watch listen laugh climb travel
start finish call answer need like want order carry repair collect""".split()

OPPOSITE = dict(
    pair.split("/")
    for pair in """
big/small hot/cold early/late fast/slow happy/sad open/closed full/empty hard/soft high/low left/right
light/dark long/short loud/quiet new/old rich/poor rough/smooth safe/dangerous strong/weak thick/thin
wet/dry clean/dirty cheap/expensive deep/shallow near/far true/false up/down wide/narrow young/aged""".split()
)
