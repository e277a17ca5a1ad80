"""Pairs of answers as models and solutions write them, and whether they mean the same: what the grader is
held to. PAIRS is judged by hand; `variants` spells an integer answer of a real set in other ways. Then answers
that mean harm. Nothing here needs a package, so that any Python can read it."""
import random
import string

# known answer: (spellings that are right), (answers that are wrong)
TABLE = {
    r'\frac{1}{2}': ([r'\dfrac{1}{2}', r'\tfrac12', '0.5', '.5', '1/2', r'\frac{2}{4}', '50\\%', r'\frac{\sqrt{4}}{4}', r'2^{-1}',
                      r'\left(\frac12\right)', r'$\frac{1}{2}$', r'x=\frac12'],
                     [r'\frac{1}{3}', '2', '0.51', r'-\frac12', '1', r'\frac{1}{2}x', '12', '(1,2)']),
    r'\frac{\sqrt{3}}{3}': ([r'\frac{1}{\sqrt{3}}', r'\sqrt{\frac{1}{3}}', r'\frac{\sqrt3}3', '3^{-1/2}', r'\tan\frac{\pi}{6}', r'\tan 30^\circ'],
                            [r'\frac{\sqrt{3}}{2}', r'\sqrt3', '0.577', r'\frac{3}{\sqrt{3}}']),
    r'2\sqrt{3}': ([r'\sqrt{12}', r'\sqrt{4\cdot 3}', '2√3', r'\frac{6}{\sqrt{3}}', r'\sqrt{3}+\sqrt3', r'2\cdot\sqrt{3}', '2*sqrt(3)'],
                   [r'3\sqrt2', r'2\sqrt{2}', '3.46', r'2+\sqrt3', r'\sqrt{6}']),
    r'1+\sqrt{2}': ([r'\sqrt2+1', r'\frac{1}{\sqrt2-1}', r'(1+\sqrt{2})'], [r'1-\sqrt2', r'2.414', r'\sqrt{3}', r'1\pm\sqrt2']),
    r'\frac{3\pi}{4}': ([r'3\pi/4', r'\frac{3}{4}\pi', r'0.75\pi', '3π/4', r'\frac{3 \pi}{4}'], [r'\frac{4\pi}{3}', '2.356', r'\frac{3}{4}', '135']),
    r'3.5': ([r'3\frac{1}{2}', r'\frac{7}{2}', '7/2', '3.50', '3 1/2', r'3\tfrac12'], ['3.05', r'\frac{3}{2}', '35', '4']),
    '12345': (['12,345', r'12{,}345', r'12\,345', '12345.0', '12 345', r'1.2345\times 10^4'], ['12346', '1234.5', '(12,345)', '123,45']),
    '1000000': ([r'10^6', '1,000,000', r'10^{6}', r'1 \times 10^6', r'1000^2'], ['100000', r'10^5', r'10^{7}', '1,000']),
    r'1.5\times 10^{-3}': (['0.0015', r'\frac{3}{2000}', r'1.5 \cdot 10^{-3}', r'15\times10^{-4}'], [r'1.5\times10^3', '0.015', '1.5']),
    r'336^\circ': (['336', r'336^{\circ}', '336°', r'336\text{ degrees}', '336 degrees'], ['335', r'33.6^\circ', r'336\text{ cm}', '24']),
    r'25\%': (['25', '0.25', r'\frac14', '25%', r'25\,\%', '25 percent'], ['2.5', '0.025', '75\\%', '4']),
    r'\$12.50': (['12.50', '12.5', r'\$12.5', r'\frac{25}{2}', '12.50 dollars', r'12.50\text{ dollars}'], ['12', '1250', '12.05']),
    r'15\text{ cm}': (['15', '15 cm', r'15\,\mathrm{cm}', r'15.0\text{ cm}'], [r'15\text{ m}', '1.5', r'15\text{ cm}^2', '150 mm']),
    r'50\text{ cm}^2': (['50', r'50 \text{ cm}^2', r'50\text{ square cm}'], [r'50\text{ cm}^3', '5', '500']),
    r'(3,-4)': ([r'\left(3,-4\right)', '(3, -4)', r'(3,\,-4)', r'(\frac62,-4)'], ['(-4,3)', '(3,4)', '[3,-4]', '(3,-4,0)', '3', r'(3,-4]']),
    r'(1,2,3)': (['(1, 2, 3)', r'\left( 1, 2, \frac{6}{2} \right)'], ['(3,2,1)', '(1,2)', '123', r'\{1,2,4\}']),
    r'1,2,3': (['3, 2, 1', r'\{1,2,3\}', '1, 2 and 3', r'1,2,\text{ and }3', r'\left\{1,2,3\right\}'], ['1,2', '1,2,4', '123', '1,2,3,4']),
    r'\{-1,1\}': ([r'\pm 1', '1,-1', r'\{1,-1\}', r'x=1\text{ or }x=-1', r'-1 \text{ and } 1'], ['1', '(1,1)', r'\{0,1\}', '-1', r'\pm 2']),
    r'2\pm\sqrt{3}': ([r'2+\sqrt3,2-\sqrt3', r'\frac{4\pm\sqrt{12}}{2}', r'2\mp\sqrt3'], [r'2+\sqrt3', r'3\pm\sqrt2', r'\pm\sqrt3']),
    r'[0,1)': ([r'x\in[0,1)', r'\left[0,1\right)', '[0, 1)'], ['(0,1)', '[0,1]', '(0,1]', '0', '1']),
    r'(-\infty,3)\cup(5,\infty)': ([r'(5,\infty)\cup(-\infty,3)', r'x \in (-\infty, 3) \cup (5, \infty)', r'(-\infty,3)\cup(5,+\infty)'],
                                   [r'(-\infty,3]\cup(5,\infty)', r'(-\infty,3)', r'(3,5)', r'(-\infty,5)\cup(3,\infty)']),
    r'x<5': ([r'5>x', 'x < 5', r'x\lt 5'], [r'x\le5', 'x>5', 'x<4', '5']),
    r'1\le x<4': ([r'1\leq x<4', r'4>x\ge1', r'1 \leqslant x < 4'], [r'1<x<4', r'1\le x\le4', '[1,4]']),
    r'x^2+2x+1': (['(x+1)^2', '1+2x+x^2', 'x(x+2)+1', r'x^{2}+2x+1', 'x^2 + 2*x + 1', '(x+1)(x+1)', 'x²+2x+1'],
                  ['x^2+2x-1', '(x-1)^2', 'x^2+1', '4', 'y^2+2y+1', '(x+1)']),
    r'\frac{x+1}{x-1}': ([r'1+\frac{2}{x-1}', r'\frac{1+x}{x-1}', r'\frac{-(x+1)}{1-x}', '(x+1)/(x-1)'], [r'\frac{x-1}{x+1}', 'x+1/x-1', r'\frac{x+1}{x}']),
    r'y=2x+3': (['y = 3+2x', '2x+3', r'2x+3=y'], ['y=2x-3', 'y=3x+2', 'x=2y+3']),
    r'a^2b': (['ba^2', r'a\cdot a\cdot b', 'a^{2}b'], ['ab^2', '2ab', 'a^2+b']),
    r'\frac{n(n+1)}{2}': ([r'\frac{n^2+n}{2}', r'\frac12 n(n+1)', 'n(n+1)/2'], [r'\frac{n(n-1)}{2}', 'n(n+1)', r'\frac{n^2}{2}']),
    r'2^{10}': (['1024', '2^10', '4^5', r'2^{10}'], ['20', '2^9', '10^2', '1023']),
    r'3^{2024}': ([r'9^{1012}', '3^{2024}', r'3\cdot 3^{2023}'], [r'3^{2023}', r'2^{2024}', '3^{2024}+1']),
    r'e^2': ([r'e\cdot e', 'e^{2}', r'\exp(2)'], ['7.389', 'e', '2e', 'e^{-2}']),
    r'\ln 2': ([r'\ln(2)', r'\frac{1}{2}\ln 4', r'-\ln\frac12', r'\log 2'], [r'\ln 3', '0.693', r'2\ln 2', r'\log_{10}2']),
    r'\log_2 3': ([r'\frac{\ln 3}{\ln 2}', r'\log_{2}(3)', r'\log_4 9'], [r'\log_3 2', r'\log_2 4', '1.585']),
    r'\sin x\cos x': ([r'\frac{1}{2}\sin 2x', r'\cos x \sin x', r'\frac{\sin(2x)}{2}'], [r'\sin 2x', r'\sin x+\cos x', r'\sin x']),
    r'\cot\theta': ([r'\frac{\cos\theta}{\sin\theta}', r'\frac{1}{\tan\theta}'], [r'\tan\theta', r'\cot x', r'\csc\theta']),
    r'120': (['5!', r'\binom{10}{3}', r'\frac{6!}{6}', '+120', '0120', '120.'], ['12', '-120', '120!', '1200', '121']),
    r'-7': (['−7', '-7.0', r'-\frac{14}{2}', '(-7)', r'7-14'], ['7', r'-\frac17', '-70', '-7.5']),
    r'0': (['0.0', '-0', '1-1', r'\frac{0}{5}', r'\sin(\pi)', r'\sqrt{0}'], ['1', 'O', r'\emptyset', '0.0001', '-']),
    r'i': (['0+i', r'\sqrt{-1}', r'e^{i\pi/2}', r'\frac{-1}{i}'], ['-i', '1', '2i', '0']),
    r'3+4i': (['4i+3', r'(2+i)^2', r'3+4 i'], ['3-4i', '4+3i', '5', '7i']),
    r'\begin{pmatrix}1&2\\3&4\end{pmatrix}': ([r'\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}', r'\begin{pmatrix}1&2\\3&\frac82\end{pmatrix}'],
                                             [r'\begin{pmatrix}1&3\\2&4\end{pmatrix}', r'\begin{pmatrix}1&2\end{pmatrix}', '1,2,3,4', '-2']),
    r'\begin{pmatrix}-1\\2\end{pmatrix}': ([r'\begin{bmatrix}-1\\2\end{bmatrix}', r'\begin{pmatrix} -1 \\ 2 \\ \end{pmatrix}'], [r'\begin{pmatrix}2\\-1\end{pmatrix}', r'\begin{pmatrix}-1&2\end{pmatrix}']),
    r'|x-1|': (['|1-x|', r'\lvert x-1\rvert', r'\left|x-1\right|'], ['x-1', '|x+1|', '1-x']),
    r'\lfloor 7/2\rfloor': (['3', r'\lfloor 3.5 \rfloor', r'\lceil 2.5\rceil'], ['3.5', '4', r'\lceil 7/2\rceil']),
    r'\sqrt[3]{2}': (['2^{1/3}', r'\sqrt[3]2', r'\sqrt[6]{4}'], [r'\sqrt{2}', r'3\sqrt2', '1.26', r'\sqrt[4]{2}']),
    r'\sqrt[3]{-8}': (['-2', r'-\sqrt[3]{8}'], ['2', '-8', r'\sqrt{-8}']),
    r'2516_8': ([r'2516_{8}', '2516_8'], ['2516_9', '2517_8', '1358']),
    r'\text{(C)}': (['C', '(C)', r'\text{C}', r'\mathrm{C}', r'\textbf{(C)}'], ['B', '(D)', r'\text{(B)}', 'AC']),
    r'\text{east}': (['East', 'east', r'\text{East}'], ['west', 'seat', r'\text{teas}', 'eats']),
    r'\text{Yes}': (['yes', 'Yes', r'\text{yes}'], ['no', r'\text{No}', 'sey']),
    r'\text{Monday}': (['Monday', r'\text{ Monday }', 'monday.'], ['Tuesday', 'Sunday']),
    r'\infty': ([r'+\infty', '∞', r'\infty'], [r'-\infty', '0', 'undefined']),
    r'\frac{a}{b}': (['a/b', r'\frac{2a}{2b}', r'a\cdot b^{-1}', r'\frac ab'], [r'\frac{b}{a}', 'ab', 'a-b']),
    r'x=-1,\ x=3': (['x=3,x=-1', '-1,3', r'\{-1, 3\}', r'x=-1\text{ or }x=3'], ['x=1,x=-3', '-1', '(x+1)(x-3)']),
    r'f(x)=x^2': (['x^2', 'f(x)=x\\cdot x', r'y=x^2'], ['f(x)=x^3', 'x', r'x^2+1']),
    r'10:30': (['10:30', '10 : 30'], ['10:31', '10.5', '1030']),
    r'2:3': ([], ['3:2', '2:5']),
    r'\frac{2}{3}\pi r^3': ([r'\frac{2\pi r^3}{3}', r'\frac23 r^3\pi'], [r'\frac{4}{3}\pi r^3', r'\frac23\pi r^2']),
    r'x_1+x_2': (['x_2+x_1', r'x_{1}+x_{2}'], ['x_1-x_2', '2x_1', 'x+x']),
    r'5\sqrt{13}': ([r'\sqrt{325}', r'5 \sqrt{13}', r'\frac{65}{\sqrt{13}}'], [r'13\sqrt5', '18.03', r'\sqrt{65}']),
    r'\frac{9}{19}': ([r'9/19', r'\dfrac{9}{19}', r'\frac{18}{38}', r'1-\frac{10}{19}'], [r'\frac{19}{9}', '0.47', '0.473684', '28']),
    # what looks alike and is not, what looks different and is
    r'\frac{1}{12}': ([r'\frac1{12}', '1/12'], [r'\frac{11}{2}', '11/2', '112']),
    r'\frac{5}{3}': (['1 2/3', r'1\frac23', '1⅔'], ['12/3', '1.67', '1.666', r'\frac{3}{5}']),
    r'\sqrt{2}x': ([r'x\sqrt2', r'\sqrt2\cdot x'], [r'\sqrt{2x}', r'2\sqrt x']),
    'x^{2y}': (['x^{2 y}', 'x^{y+y}'], ['x^2y', 'x^{2}y', 'x^{y^2}']),
    r'\log_{2}3': ([r'\log_2(3)'], [r'\log_{23}', r'\log 23']),
    r'\pi r^2': ([r'r^2\pi', 'πr²'], [r'\pi R^2', r'2\pi r', r'\pi^2 r']),
    r'\arctan 2': ([r'\tan^{-1} 2', r'\tan^{-1}(2)'], [r'\cot 2', r'\frac{1}{\tan 2}', r'\tan 2']),
    'TFT': (['TFT'], ['FTT', 'TTF', 'TF', 'tft']),
    'no': (['No', r'\text{no}'], ['on', 'yes']),
    r'\sqrt2': (['√2', r'\sqrt{2}', r'2^{1/2}', r'2^{0.5}'], ['1.4142135624', '1.41421356237', '1.414']),
    '0.333': ([r'\frac{333}{1000}'], ['0.333...', r'\frac13', r'0.3\ldots']),
    'e^{-40}': ([r'\frac{1}{e^{40}}', r'\exp(-40)'], ['0', 'e^{-50}', 'e^{40}']),
    '3+4\\mathrm{i}': (['3+4i'], ['7', '3+4', '3-4i']),
    r'5\text{ million}': ([r'5 \text{ million}', '5000000'], ['5', '5000', r'5\text{ million}^2', r'5\text{ million million}']),
    r'5': ([r'5\text{ apples}', '5.'], ['5\'', r'5\ldots', '5!', r'\ne 5', '5>x', r'\sqrt{5}', '|5-x|', r'5 \pmod 7', '5i', '5;6', r'5^\circ C', '5/2/1', r'5\text{ or }7', r'5\text{ dozen}', r'5\text{ million}', '5 or 7', r'5\pm1']),
    r'7': ([r'7\text{ cm}^{2}', r'7\text{ cm}^2', '7 sq cm'], ['7x', '7i', '7!']),
    r'\$5': (['5', '5 dollars', r'5\text{ dollars}', '$5$'], [r'5\text{ cents}', '5 cents', r'\$50']),
    r'5\%': (['5', '0.05', r'5\text{ percent}', '5 percent'], [r'5\text{ cm}', r'500\%', '0.5']),
    '2,3': (['3,2', 'x=2,x=3'], ['x=2,y=2', '2,2', '2,2,3', '2', '3,3']),
    '1,1,2': (['2,1,1'], ['1,2,2', '1,2']),
    'f(2)=5': (['f(2)=5'], ['f(3)=5', 'g(2)=5']),
    r'f(x)=x,\ g(x)=2x': (['g(x)=2x,f(x)=x'], ['f(x)=2x,g(x)=x', 'f(x)=x']),
    '32,348': ([r'32,\!348', '32348', r'32\,348'], ['32.348', '(32,348)']),
    '100, 200': (['200, 100', '200 and 100'], ['100200', '300']),
    '1234': (['1,234'], ['1, 234', '12, 34']),
    r'11,111,100': ([r'11,\! 111,\! 100', '11111100'], ['11,111,1000']),
    r'\{1\pm\sqrt5,-2\}': ([r'-2,1+\sqrt5,1-\sqrt5', r'\{-2,1\pm\sqrt5\}'], [r'1\pm\sqrt5', r'\{1\pm\sqrt5,2\}']),
    r'\pm1,\pm2': (['-2,-1,1,2', r'\{\pm 2,\pm 1\}'], [r'\pm1', '1,2']),
    '(1,2)': (['(x,y)=(1,2)', '(a, b) = (1, 2)'], ['(x,y)=(2,1)', 'x=1,y=2']),
    r'2\sqrt3': (['√12', '2√3'], ['√32', '√1 2']),
    'x^5': (['x⁵', 'x·x⁴'], ['5x', 'x5']),
    r'\sqrt[3]{2-\sqrt5}': ([r'\frac{1-\sqrt5}{2}', r'-\sqrt[3]{\sqrt5-2}'], [r'\frac{1+\sqrt5}{2}', r'\sqrt[3]{2+\sqrt5}']),
    r'\textbf{(B)}\ 5': (['5', 'B', '(B)', r'\textbf{(B)} 5'], ['C', '6', '(C)']),
    # letters of multiple choice, units and scales: a word after a number is a unit only if it is one
    'A': ([r'\text{A}', '(A)', r'\textbf{(A)}', r'\text{(A)}', 'A.'],
          [r'\text{A}\text{B}\text{C}\text{D}\text{E}', 'B', 'a', 'A,B', 'AB', r'\text{A or B}', '1', 'not A']),
    'E': ([r'\mathrm{(E)}'], [r'\text{A}\text{B}\text{C}\text{D}\text{E}', 'A,B,C,D,E']),
    r'\textbf{(C)}\ 12': ([r'\textbf{(C) }12', 'C', '12', r'\text{(C)} 12.0'], [r'\textbf{(D)}\ 12', r'\textbf{(C)}\ 13', 'D', '13']),
    '8': ([r'8\text{ apples}', '8 apples', r'8 \text{ people}', '8 ways', '8.0'],
          [r'8 \text{ trillion}', r'8 \text{ thousandths}', r'8\text{ factorial}', r'8 \text{ never}', r'\text{not } 8', '8 or 9', r'8\text{ squared}',
           r'8 \text{ times } 2', r'8\text{ halves}', r'8 \text{ mod } 3', r'8\text{ minus }1', r'8 \text{ percent of } 9', r'8 \text{ or less}']),
    r'12\text{ dollars}': ([r'\$12', '12 dollars', '12', r'\$12.00', '$12'], ['12 cents', '13 dollars', r'12\text{ hundred dollars}', '1200']),
    r'1\text{ million}': (['1000000', r'10^6', '1,000,000', '1 million', r'1000\text{ thousand}'], [r'1\text{ billion}', '1', r'1\text{ thousand}']),
    r'2.5\text{ million dollars}': (['2500000', r'\$2.5\text{ million}', '2.5 million', r'\$2,500,000'], ['2.5', '2.5 million cents', r'\$2.5']),
    r'6\text{ square inches}': (['6', r'6\text{ in}^2', r'6 \text{ inches}^2', '6 square inches'], [r'6\text{ cubic inches}', r'6\text{ inches}', '36']),
    # digits, quotes and dollars that stand side by side are no number
    '42': (['42', '$42$', r'\(42\)', r'\text{42}', '(42)', r'\{42\}', '42.'], ['4\\$2', '4"2"', '4 2', '4$2$', r'4\text{2}', '4_2', '4,2', '4..2']),
    '6': ([r'2\cdot3', r'2\times 3', '(2)(3)'], ['2 3', '23', '2.3', '2,3']),
    '2x': (['x+x', r'x\cdot2', '2 x', 'x = 2x'], ['x2', 'x^2', 'x_2', '2X']),
    'ab': (['ba', r'a\cdot b', 'a b'], ['AB', 'Ab', 'a', 'b']),
    'AB': ([r'AB', r'\overline{AB}'], ['ab', 'A', 'AC']),
    'x=5': (['5', 'x = 5', r'x=\frac{10}{2}', r'x=\frac{10}{2}=5'], ['x=7=5', 'y=5', 'x=6', '5=7']),
    r'0.\overline{3}': ([r'\frac13', '1/3', r'0.\overline{33}', r'.\overline{3}'], ['0.3', '0.33', '0.3333333333', r'0.\overline{6}', '3']),
    '1,050': (['1050', '1050.0'], ['1, 50', '1,50', '(1,050)']),
    r'\frac{1}{6}': ([r'0.1\overline{6}', r'\frac{0.5}{3}'], ['0.16', '0.1666667', r'0.\overline{16}', '6']),
    # large, small and nearly equal
    r'10^{15}+\sqrt2': ([r'\sqrt2+10^{15}', r'1000000000000000+\sqrt{2}'], [r'10^{15}+\sqrt3', '10^{15}', r'10^{15}+1.41421356']),
    '1000000000000001': (['1,000,000,000,000,001'], ['1000000000000002', r'10^{15}', '1000000000000001.5']),
    '0.00000000000000000001': ([r'10^{-20}', r'\frac{1}{100000000000000000000}'], ['0', '0.00000000000000000002']),
    # expressions, relations, intervals and matrices: math-verify's part
    '|x-25|': (['|25-x|'], ['25-x', 'x-25']),
    '25-x': (['-x+25', '-(x-25)'], ['|x-25|', 'x-25', '25+x']),
    'x>2': ([r'(2,\infty)', '2<x', r'x \in (2, \infty)'], [r'[2,\infty)', 'x<2', r'x\ge2', '2']),
    '(0,1)': (['0<f<1', '0 < x < 1'], ['[0,1]', '(0,1]', r'0\le f\le1', '0', '(1,0)']),
    '2x+y=3': (['4x+2y=6', 'y=3-2x', 'y+2x-3=0'], ['2x+y=4', 'x+2y=3', '2x-y=3']),
    '4, 5': (['AB=4,CD=5', '5, 4', r'4\text{ and }5'], ['AB=4,CD=6', '4', '45', '4.5', '(4,5,6)']),
    r'\left[\begin{array}{cc}1&2\\3&4\end{array}\right]': ([r'\begin{pmatrix}1&2\\3&4\end{pmatrix}', r'\begin{bmatrix}1&2\\3&4\end{bmatrix}'],
                                                          [r'\begin{pmatrix}1&2\\3&5\end{pmatrix}', r'\begin{pmatrix}1&3\\2&4\end{pmatrix}']),
    '(1,2),(3,4)': (['(3,4),(1,2)', r'\{(1,2),(3,4)\}', r'(1, 2) \text{ and } (3, 4)'], ['(1,2)', '(2,1),(3,4)', '(1,2,3,4)', '1,2,3,4']),
    '100,200': (['100, 200', '200,100', '100200'], ['300', '100', '100,201']),
}
PAIRS = [(answer, other, right) for answer, sides in TABLE.items() for right, some in zip((True, False), sides, strict=True) for other in some]


def variants(answer):
    """An integer answer of a real set -> [(spelling, is it right)]."""
    n = int(float(answer))
    return [(f'{n}.0', True), (f'0{n}' if n > 0 else f'{n}', True), (f'\\text{{{n}}}', True), (f'{n}^\\circ', True), (f'\\frac{{{3 * n}}}{{3}}', True),
            (f'{n:,}', True), (f'x = {n}', True), (f'{n + 1}', False), (f'{n + 1}0', False), (f'{n}.5', False), (f'{-n - 3}', False), (f'\\frac{{{n + 1}}}{{7}}', False)]


# ---- answers that mean harm -----------------------------------------------------------------------

ROUTES = ['__import__("os").system("touch {f}")', 'eval("open(\'{f}\',\'w\')")', 'exec("open(\'{f}\',\'w\')")', 'open("{f}","w")',
          '().__class__.__base__.__subclasses__()', '{{{{7*7}}}}', '${{{{open("{f}","w")}}}}', '%(x)s' , '{{0.__class__}}',
          'lambda: open("{f}","w")', '[open("{f}","w") for x in [1]]', 'getattr(__builtins__,"open")("{f}","w")', '`touch {f}`',
          '$(touch {f})', '; touch {f}', '\\input{{{f}}}', '\\write18{{touch {f}}}', 'sympify("open(\'{f}\',\'w\')")', '@open', 'import os',
          'yield', 'f"{{open}}"', 'compile("1","{f}","exec")', 'breakpoint()', 'exit()', 'raise SystemExit', 'os._exit(0)', 'globals()']
LARGE = ['9**9**9', '9^{9^{9}}', '9^9^9^9', '(10^{1000})^{1000}', '2^{100000000}', '1000000!', '9!!!!!!', '\\binom{10^9}{5\\cdot10^8}', '1' * 1999,
         '10^{-999999999}', '0.' + '3' * 1900, '((2^{200})^{200})^{200}', '1' + '0' * 1000 + '/' + '7' * 900, '\\sqrt{' * 300 + '2' + '}' * 300, '2^{' * 500 + '2' + '}' * 500,
         '\\frac{1}{' * 200 + '2' + '}' * 200, '1/0', '0^{-1}', '0^0', '\\log 0', '\\tan(\\pi/2)', '1e999999', '\\infty-\\infty', '\\frac{0}{0}', '\\sqrt[0]{2}', '(-8)^{1/3}',
         '\\lfloor i\\rfloor', '\\lfloor\\infty\\rfloor', '10^{400}i', '\\sin(10^{400})', '\\exp(10^{30})', '|' * 999, '!' * 999, 'x' + '!' * 900, '+'.join(['9^{999}'] * 200),
         '*'.join(['x'] * 900), '+'.join(['x^{999}'] * 200), 'x^{x^{x^{x^x}}}', '\\pm' * 600 + '1', '1' + '\\pm1' * 300, '\\cup'.join(['(0,1)'] * 200), ','.join(['x'] * 900),
         ','.join(str(i) for i in range(400)), '(' + ','.join(['1'] * 900) + ')', '\\{' + ','.join(f'x^{i}' for i in range(59)) + '\\}']
SLOW = ['+'.join(['\\sqrt{x^{990}+1}'] * 100), 'x' + '%' * 250, '+'.join(['\\sqrt{9^{2400}+1}'] * 40) + '+x', ','.join(['(a+b+c+d+e+f+g+h)/0'] * 60),
        '\\sqrt[63]{9^{2400}+1}', '⁵', 'x^⁵', '₂', '②', '\\text{⁵}', '\\sqrt[]{2}', 'x^' * 900 + '2', '\\sqrt' * 300 + '2', '()' * 500]
DEEP = ['(' * 10**6, '{' * 10**6 + '}' * 10**6, '(' * 900 + '1' + ')' * 900, '[' * 900 + ']' * 900, '\\{' * 600 + '\\}' * 600, '-' * 1900 + '1', '{' * 999 + '1' + '}' * 999,
        '\\begin{pmatrix}' * 100, '\\begin{pmatrix}' + '1&' * 900, '\\begin{pmatrix}' + '1\\\\' * 600 + '\\end{pmatrix}', '\\left(' * 300, '_' * 900, '^' * 900, 'x_' * 900]
STRANGE = ['\x00', '1\x00', '\x001', '\u202e241', '142\u202e', '\ud800', '\uffff' * 500, '\u0000' * 1999, '🙂' * 1000, 'e\u0301' * 500, '\u200b' * 1900, '\ufeff142', 'a' * 10**6,
           '"' * 1000, '\\' * 1999, '\\text{' * 300, '\\text{a' * 200 + '}' * 200, '$' * 1999, ' ' * 1999, '\t\n\r' * 600, 'a' * 1998 + '!', ('a ' * 999), '1,' * 999, '1 ' * 999,
           ('1 ' * 999) + 'x', '1,000' * 390, '.' * 1999, '1.' * 999, '.1' * 999, '&' * 999, '%' * 999, '1' + '%' * 999, '\\circ' * 300, '5 square ' * 200, 'sq ' * 600, '١' * 1999]


def noise(count):
    rng = random.Random(0)
    parts = ['\\frac', '\\sqrt', '{', '}', '(', ')', '[', ']', '^', '_', '!', '|', '1', '23', 'x', '\\pm', ',', '\\text{', '\\begin{pmatrix}', '&', '\\\\', '\\end{pmatrix}',
             '=', '<', '\\sin', '\\log', '%', '\\cup', '"', '\\lfloor', '\\binom', '-', '+', '*', '/', ' ', '\\in', '\\{', '\\}', '.', 'and', 'e', 'i', '\\infty']
    for _ in range(count):
        yield ''.join(rng.choice(parts) for _ in range(rng.randrange(1, 200)))
    for _ in range(count):
        yield ''.join(rng.choice(string.printable) for _ in range(rng.randrange(1, 300)))
