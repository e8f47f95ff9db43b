"""Scripts that read the chart page of the MLflow UI, for `Page.wait`."""

# The lines of the chart with this title as plotly has them: name, x and y of each, once those of so many runs are drawn
# (over more than 100 pixels). The page scrolls on until the chart is there; runs come one by one, some with two lines.
CHART = """
const cards = [...document.querySelectorAll('[data-testid="experiment-view-compare-runs-card"]')];
const card = cards.find(card => card.querySelector('h4')?.title === arguments[0]);
if (!card) {
  // A chart is made when its place comes into sight.
  document.querySelector('[data-testid="experiment-view-compare-runs-chart-area"]')?.scrollBy(0, 300);
  return null;
}
card.scrollIntoView({block: 'center'});
const plot = card.querySelector('.js-plotly-plot');
const lines = (plot?.data ?? []).filter(line => line.x?.length);
const paths = [...card.querySelectorAll('.scatterlayer path.js-line')];
const width = Math.max(0, ...paths.map(path => path.getBoundingClientRect().width));
if (new Set(lines.map(line => line.name)).size < arguments[1] || width <= 100) return null;
return lines.map(line => [line.name, Array.from(line.x), Array.from(line.y)]);
"""
# What the chart with this title, which is in sight, is made of, once so many elements of that selector are drawn: type
# and values of each part.
PARTS = """
const cards = [...document.querySelectorAll('[data-testid="experiment-view-compare-runs-card"]')];
const card = cards.find(card => card.querySelector('h4')?.title === arguments[0]);
card?.scrollIntoView({block: 'center'});
if (!card || card.querySelectorAll(arguments[1]).length < arguments[2]) return null;
const values = array => Array.from(array ?? []);
return card.querySelector('.js-plotly-plot').data.map(part => (
  {type: part.type, x: values(part.x), y: values(part.y), z: values(part.z)}
));
"""
# Axes of the parallel coordinates: name and ticks of each, once something is drawn between them.
AXES = """
const cards = [...document.querySelectorAll('[data-testid="experiment-view-compare-runs-card"]')];
const card = cards.find(card => card.querySelector('h4')?.title === 'Parallel Coordinates');
card?.scrollIntoView({block: 'center'});
const axes = [...(card?.querySelectorAll('.dimension') ?? [])];
const canvas = card?.querySelector('canvas.foreground');
if (!axes.length || !canvas) return null;
const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
if (!pixels.some(value => value)) return null;
return axes.map(axis => [
  axis.querySelector('.label').textContent, [...axis.querySelectorAll('.tick text')].map(tick => tick.textContent)
]);
"""
# Titles of the charts that the page has by now, once there are so many: those further down appear as one scrolls.
TITLES = """
const titles = [...document.querySelectorAll('[data-testid="experiment-view-compare-runs-card"] h4')];
return titles.length < arguments[0] ? null : titles.map(title => title.title);
"""
